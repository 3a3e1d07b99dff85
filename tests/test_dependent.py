"""Dependent quantisation: the best path is found, and what is coded comes back."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import SAMPLE
from PIL import Image

from mlic.codec import decode_file, encode_picture
from mlic.coder import SymbolDecoder, SymbolEncoder
from mlic.config import FAST
from mlic.container import MlicFile
from mlic.dependent import CHAIN, FILES, FIRST_ROW, QUICK, SHIFTS, STEPS, States, Trellis, choose, levels_of, parts, symbols_of
from mlic.errors import WeightsError
from mlic.model import level_lambda
from mlic.pictures import Picture
from mlic.prior import SCALE_LEVELS, GaussianPrior, scale_table
from mlic.tables import CodingTables, TableSet, gaussian_tables, lattice_bits
from mlic.weights import load_model, load_weights, save_weights


@pytest.fixture(scope="module")
def tables() -> CodingTables:
    return CodingTables(gaussian_tables(dependent=True), gaussian_tables())


def drawn(count: int, *, first: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals and the rows of their scales."""
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.integers(first, 40, count))
    return (torch.from_numpy(random.normal(size=count)) * scale_table()[rows]).float(), rows


def test_every_symbol_has_one_place():
    for count in (0, 1, 5, CHAIN, CHAIN + 1, 3000):
        rows = drawn(count)[1].numpy()
        plain, turns = parts(rows)
        assert sorted(np.concatenate([plain, *turns]).tolist()) == list(range(count))
        assert (rows[plain] < FIRST_ROW).all() and all((rows[turn] >= FIRST_ROW).all() for turn in turns)
        assert len(turns) <= CHAIN and len({len(turn) for turn in turns[:-1]}) <= 1
        assert not turns or len(turns[-1]) <= len(turns[0])


def test_levels_and_symbols():
    symbols = np.arange(-9, 10)
    for lattice in (0, 1):
        levels = levels_of(symbols, np.full(len(symbols), lattice))
        assert (symbols_of(levels) == symbols).all()
        assert (levels[levels != 0] % 2 == lattice).all() and (np.diff(levels) > 0).all()


@pytest.mark.parametrize("trellis", [FILES, QUICK])
def test_every_state_can_be_reached_from_two(trellis):
    states = len(trellis.next)
    assert trellis.next.shape == (states, 2) and (np.bincount(trellis.next.flatten()) == 2).all()
    ways = [set() for _ in range(states)]
    for state, parity in itertools.product(range(states), (0, 1)):
        ways[trellis.next[state, parity]].add((trellis.lattice[state], parity))
        assert trellis.branch[state, trellis.next[state, parity] & 1] == 2 * trellis.lattice[state] + parity
    assert all(len(two) == 2 for two in ways)  # by different branches, or one of them would be of no use


def granular_gain(trellis: Trellis) -> float:
    """How much less the squared error is, in dB, than that of one lattice, for numbers drawn evenly, far from zero."""
    size, chains = 400, 40
    residual = 1000 + 4 * STEPS[40] * torch.rand(size * chains, generator=torch.Generator().manual_seed(0))
    rows = torch.full((len(residual),), 40)
    levels, _ = choose(residual, rows, torch.zeros_like(rows), torch.zeros(2, 64, 2), 1.0, trellis)
    error = (STEPS[rows] * levels - residual).square().mean()
    return 10 * math.log10((2 * STEPS[40]) ** 2 / 12 / error)


def test_how_much_finer_both_lattices_are():
    """Ungerboeck's codes of 8 and 256 states gain 1.09 and 1.33 dB (Marcellin & Fischer 1990, table 1); of 1.53 that there are.
    The beginning of each chain costs some.
    """
    assert granular_gain(Trellis(3, 0b101, 0b10)) == pytest.approx(1.05, abs=0.03)
    assert 1.15 < granular_gain(Trellis(7, 0o124, 0o46)) < granular_gain(FILES) < 1.4


def test_free_chains_gain_by_where_they_begin():
    """More than any code that a decoder could follow; one free chain as long as all together gains nothing by it."""
    begun, free = (Trellis(3, 0b101, 0b10, length=16000, free=free) for free in (False, True))
    assert granular_gain(free) == pytest.approx(granular_gain(begun), abs=0.01)
    assert granular_gain(QUICK) > 1.53


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("error_bits", [3.0, 18.0])
@pytest.mark.parametrize("shifts", [None, SHIFTS])
def test_the_best_path_is_found(tables, seed, error_bits, shifts):
    residual, rows = drawn(5, first=FIRST_ROW, seed=seed)
    bits = lattice_bits(tables.gaussian)
    levels, spent = choose(residual, rows, torch.zeros_like(rows), bits, error_bits, shifts=shifts)
    order = np.argsort(rows.numpy(), kind="stable")  # one chain

    def cost(symbols) -> tuple[float, list[int], list[float]]:
        state, error, path, each = 0, 0.0, [], []
        for symbol, place in zip(symbols, order):
            path.append(int(levels_of(np.array(symbol), FILES.lattice[state])))
            each.append(bits[FILES.lattice[state], rows[place], abs(symbol)].item())
            value = STEPS[rows[place]].item() * path[-1]
            if shifts is not None:
                value += math.copysign(shifts[rows[place], min(3, abs(path[-1]))].item(), path[-1])
            error += (value - residual[place].item()) ** 2
            state = FILES.next[state, symbol & 1]
        return error_bits * error + sum(each), path, each

    near = [round(residual[place].item() / (2 * STEPS[rows[place]].item())) for place in order]
    best = min(cost(symbols) for symbols in itertools.product(*(range(k - 3, k + 4) for k in near)))
    assert levels.dtype == torch.int64 and levels[order].tolist() == best[1]
    assert spent[order].tolist() == pytest.approx(best[2])


@pytest.mark.parametrize("shifted", [False, True])
def test_what_levels_stand_for(tables, shifted):
    """As docs/format.md has it, on the grid of exact arithmetic."""
    prior = GaussianPrior("linear", shifted=shifted)
    prior.lattice_bits = lattice_bits(tables.gaussian)
    scale, levels = scale_table()[:, None].repeat(1, 11), torch.arange(-5.0, 6)[None].repeat(SCALE_LEVELS, 1)
    values = prior.values(levels.double(), scale)
    assert ("shifts" in prior.state_dict()) == shifted and (values * 2**12 == (values * 2**12).round()).all()
    for row, n in itertools.product(range(SCALE_LEVELS), range(-5, 6)):
        step = 1 if row < 7 else 11 / 16 if row < 16 else 5 / 8
        shift = prior.shifts[row, min(abs(n), 3)].item() if shifted else 0
        assert values[row, n + 5] == step * n + (n > 0) * shift - (n < 0) * shift
    prior.lattice_bits = None  # as in training
    assert torch.equal(prior.values(levels, scale), levels)


def test_nothing_to_choose(tables):
    nothing = torch.zeros(0, dtype=torch.int64)
    levels, spent = choose(torch.zeros(0), nothing, nothing, lattice_bits(tables.gaussian), 18.0)
    assert len(levels) == len(spent) == 0


def test_batches_do_not_know_of_each_other(tables):
    bits = lattice_bits(tables.gaussian)
    three = [drawn(count, first=FIRST_ROW, seed=count) for count in (700, 0, 35000)]  # the last one's chains in two turns
    batch = torch.cat([torch.full((len(rows),), i) for i, (_, rows) in enumerate(three)])
    together = choose(torch.cat([x for x, _ in three]), torch.cat([rows for _, rows in three]), batch, bits, 18.0)
    alone = [choose(x, rows, torch.zeros_like(rows), bits, 18.0) for x, rows in three]
    assert all((both == torch.cat(own)).all() for both, own in zip(together, zip(*alone)))


def test_it_is_better_than_plain_symbols(tables):
    """Gaussians at their own scales: error and bits by the tables."""
    residual, rows = drawn(20000, first=FIRST_ROW)
    prior = GaussianPrior("linear", 18.0)
    scale = scale_table()[rows].float()
    plain = prior.nearest(residual[None], scale[None])
    own = torch.tensor([np.log2(2**24 / tables.gaussian.row(row)[k - tables.gaussian.first[row]])
                        for row, k in zip(rows.tolist(), plain[0].int().tolist())])  # fmt: skip
    before = 18 * (plain[0] - residual).square().mean() + own.mean()
    levels, spent = choose(residual, rows, torch.zeros_like(rows), lattice_bits(tables.gaussian), 18.0)
    after = 18 * (STEPS[rows] * levels - residual).square().mean() + spent.mean()
    assert 0.05 < before - after < 0.25  # bits a symbol; 0.25 is what lies between plain ones and any code at all


@pytest.mark.parametrize("count", [1, 40, 5000])
def test_what_is_coded_comes_back(tables, count):
    residual, rows = drawn(count)
    far = residual * torch.where(torch.arange(count) % 97 == 0, 400, 1)  # escapes
    dependent = rows >= FIRST_ROW
    levels = far.round()
    levels[dependent] = choose(
        far[dependent], rows[dependent], torch.zeros_like(rows[dependent]), lattice_bits(tables.gaussian), 18.0
    )[0].float()
    levels, rows = levels.int().numpy(), rows.numpy()
    encoder = SymbolEncoder(tables)
    for _ in range(2):
        encoder.put_latent(levels, rows)
    stream, escapes, checksum = encoder.finish()
    decoder = SymbolDecoder(tables, stream, escapes, checksum)
    assert (decoder.get_latent(rows) == levels).all() and (decoder.get_latent(rows) == levels).all()
    assert decoder.batches == 2
    decoder.finish()
    if count > 1000:
        cut = SymbolDecoder(tables, stream[: len(stream) // 2 // 4 * 4 + 400], escapes, checksum, partial=True)
        assert (cut.get_latent(rows) == levels).all() and not cut.get_latent(rows).any()
        assert cut.exhausted and cut.batches == 1


def test_states_move_by_parity():
    states = States([np.arange(3), np.arange(2)])
    states.move(np.array([0, -1, 3]))
    assert states.state.tolist() == [0, 1, 1] and states.lattices(np.arange(3)).tolist() == [0, 1, 1]
    states.move(np.array([1, 1]))  # the last chain has ended
    assert states.state.tolist() == [1, 3, 1] and states.lattices(np.arange(2)).tolist() == [1, 0]


def test_tables_of_the_lattices(tables):
    assert tables.dependent and len(tables.gaussian.sizes) == 3 * SCALE_LEVELS
    plain = gaussian_tables()
    for row, sigma in enumerate(scale_table().tolist()):
        assert (tables.gaussian.row(row) == plain.row(row)).all()
        for lattice in (0, 1):
            at = SCALE_LEVELS * (1 + lattice) + row
            masses, half = tables.gaussian.row(at) / 2**24, -tables.gaussian.first[at]
            np.testing.assert_allclose(masses[:half], masses[half + 1 : -1][::-1], atol=1e-4)  # the likeliest gets what is left
            edge = STEPS[row].item() * (1 - lattice / 2)  # of the zero's cell
            assert masses[half] == pytest.approx(torch.special.erf(torch.tensor(edge / sigma / 2**0.5)).item(), abs=1e-4)


def test_the_packaged_weights_gain_by_it():
    """Against the same network with plain symbols: squared error times lambda, and bits."""
    model = load_model("fast")
    assert model.config.dependent
    pixels = np.asarray(Image.open(SAMPLE).convert("RGB").crop((130, 60, 386, 316)))
    gains = []
    for quality in (35, 65, 90):
        lmbda = level_lambda(model.config, torch.tensor((quality - 1) / 99 * 63)).item()

        def cost() -> float:
            coded = encode_picture(model, Picture(pixels), quality, effort=0, reconstruct=True)
            error = np.square(coded.reconstruction.astype(float) - pixels).mean()
            assert (decode_file(model, MlicFile.from_bytes(coded.data)).pixels == coded.reconstruction).all()
            return lmbda * error + 8 * len(coded.data) / pixels[..., 0].size

        own, gaussian, bits = cost(), model.gaussian, model.gaussian.lattice_bits
        try:
            tables = model.tables
            gaussian.lattice_bits = None
            model.tables = CodingTables(gaussian_tables(), tables.prior)
            model.__dict__.pop("_exact_twin", None)
            gains.append(cost() / own)
        finally:
            gaussian.lattice_bits, model.tables = bits, tables
            model.__dict__.pop("_exact_twin", None)
    assert all(gain > 1.03 for gain in gains)


def test_tables_of_another_quantisation_are_refused(small_models, tmp_path):
    from mlic.model import build_model

    config = dataclasses.replace(small_models["fast"].config, dependent=0)
    model = build_model(config)
    model.load_state_dict(small_models["fast"].state_dict())
    save_weights(tmp_path / "plain.safetensors", model)
    assert load_weights(tmp_path / "plain.safetensors").gaussian.lattice_bits is None
    model.config = dataclasses.replace(config, dependent=512)
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(tmp_path / "plain.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(tensors, tmp_path / "odd.safetensors", metadata | {"config": model.config.to_json()})
    with pytest.raises(WeightsError, match="another quantisation"):
        load_weights(tmp_path / "odd.safetensors")


def test_the_form_of_eight_states_is_refused():
    """Its weights said true, which is 1; those without it said false, or nothing."""
    assert not dataclasses.replace(FAST, dependent=False).dependent
    with pytest.raises(ValueError, match="0 or 512 states, not True"):
        dataclasses.replace(FAST, dependent=True)


def test_bits_of_rows_of_any_shape(tables):
    """Those of a damaged file, too, which is not an error here."""
    odd = [np.full(4096, 1 << 12), np.array([1 << 23, 1 << 23])]
    rows = [tables.gaussian.row(i) for i in range(SCALE_LEVELS)] + 64 * odd
    bits = lattice_bits(TableSet.from_rows(rows, [0] * len(rows)))
    assert torch.isfinite(bits).all() and (bits[:, 0] == 12).all() and bits[0, 1, 0] == 1
