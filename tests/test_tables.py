"""Integer coding tables: what they sum to, what they cost, and that damaged ones are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlic.prior import SCALE_LEVELS, FactorizedPrior, GaussianPrior, scale_table
from mlic.tables import (
    CodingTables,
    SymbolCounter,
    TableSet,
    gaussian_tables,
    integer_frequencies,
    make_tables,
    prior_tables,
)


def test_a_density_that_begins_around_zero_is_high_there():
    prior = FactorizedPrior(1).requires_grad_(False)
    for bias in prior.biases:
        bias.zero_()
    there, beside = prior.likelihood(torch.tensor([0.0, 1e-3]).view(1, 1, 1, 2)).flatten().tolist()
    assert there == pytest.approx(beside, rel=1e-3) and there > 0.01


def learned_prior(channels: int = 6, levels: int = 0) -> FactorizedPrior:
    """A prior with densities of different place, width and shape in each channel."""
    torch.manual_seed(0)
    prior = FactorizedPrior(channels, levels=levels).requires_grad_(False)
    for parameter in [*prior.factors, *prior.biases]:
        parameter.uniform_(-1, 1)
    prior.matrices[0] += torch.linspace(0.5, 3, channels)[:, None, None]
    prior.median.copy_(torch.linspace(-3.3, 4.7, channels))
    if levels:
        prior.level_scale.rows.copy_(torch.linspace(-0.5, 1, levels)[:, None].expand(levels, channels))
        prior.level_shift.rows.copy_(torch.linspace(1, -0.5, levels)[:, None].expand(levels, channels))
    return prior


@pytest.fixture(scope="module")
def gaussian() -> TableSet:
    return gaussian_tables()


@pytest.mark.parametrize("which", ["gaussian", "prior", "prior-with-levels", "fresh-prior"])
def test_every_row_sums_to_2_24_without_zeros(which, gaussian):
    tables = {
        "gaussian": lambda: gaussian,
        "prior": lambda: prior_tables(learned_prior()),
        "prior-with-levels": lambda: prior_tables(learned_prior(levels=5)),
        "fresh-prior": lambda: prior_tables(FactorizedPrior(3)),
    }[which]()
    assert len(tables.sizes) == {"gaussian": 64, "prior": 6, "prior-with-levels": 30, "fresh-prior": 3}[which]
    for row in range(len(tables.sizes)):
        frequencies = tables.row(row)
        assert frequencies.sum(dtype=np.int64) == 1 << 24
        assert frequencies.min() >= 1
        assert tables.first[row] <= 0 <= tables.first[row] + tables.sizes[row] - 2


def test_gaussian_rows_are_symmetric(gaussian):
    for row in range(64):
        symbols = gaussian.row(row)[:-1]
        assert gaussian.first[row] == -(len(symbols) // 2)
        np.testing.assert_array_equal(symbols, symbols[::-1])


@pytest.mark.parametrize("row", [*range(0, 64, 7), 62])
def test_gaussian_rows_cost_what_the_gaussian_costs(gaussian, row):
    """Cross-entropy, with 8 bits for an escape, against the entropy of the Gaussian in unit bins."""
    sigma = scale_table()[row].item()
    k = np.arange(-math.ceil(12 * sigma) - 2, math.ceil(12 * sigma) + 3)
    edge = [0.5 * math.erfc(e / sigma / math.sqrt(2)) for e in np.append(np.abs(k) - 0.5, 0)[:-1]]
    beyond = [0.5 * math.erfc(e / sigma / math.sqrt(2)) for e in np.abs(k) + 0.5]
    masses = np.subtract(edge, beyond)
    assert masses.sum() == pytest.approx(1, abs=1e-12)
    ideal = -sum(p * math.log2(p) for p in masses if p > 0)
    bits = 24 - np.log2(gaussian.row(row))
    position = k - gaussian.first[row]
    inside = (position >= 0) & (position < len(bits) - 1)
    cost = np.where(inside, bits[np.where(inside, position, 0)], bits[-1] + 8)
    assert masses @ cost <= 1.001 * ideal + 1e-6  # 2^-24 of frequency is 1e-6 bits of a certain symbol
    assert masses @ cost >= ideal - 1e-9


def counted(row: int, symbols: list[int]) -> np.ndarray:
    counter = SymbolCounter()
    counter.put_hyper(np.array([5]), np.array([row]))  # z has its own tables
    counter.put_latent(np.array(symbols), np.full(len(symbols), row))
    return counter.counts


def test_rows_follow_what_was_counted(gaussian):
    """Many symbols outweigh the Gaussian, few do not; signs are taken together; other rows stay as they were."""
    symbols = [1] * 60_000 + [0] * 40_000 + [1601, -4000] * 50
    tables, row = gaussian_tables(counted(20, symbols)), 20
    middle = -tables.first[row]
    found = tables.row(row) / 2**24
    np.testing.assert_allclose(found[middle - 1 : middle + 2], [0.3, 0.4, 0.3], atol=2e-3)
    assert found[-1] == pytest.approx(0.001, rel=0.01), "beyond the row: the escape"
    for other in (0, 19, 21, 63):
        np.testing.assert_array_equal(tables.row(other), gaussian.row(other))
    few = gaussian_tables(counted(row, [3])).row(row) / 2**24
    np.testing.assert_allclose(few, gaussian.row(row) / 2**24, atol=0.01)


@pytest.mark.parametrize("form", ["linear", "log"])
def test_index_is_the_nearest_scale_in_the_log_domain(form):
    prior = GaussianPrior(form)
    assert prior.thresholds.shape == (SCALE_LEVELS - 1,)
    sigma = torch.linspace(math.log(0.02), math.log(2000), 5000, dtype=torch.float64)
    distance = (sigma[:, None] - scale_table().log()).abs()
    closest, second = distance.topk(2, largest=False).values.T
    clear = second - closest > 1e-4  # float32 thresholds may decide the ties
    raw = (sigma if form == "log" else sigma.exp()).float()
    assert clear.sum() > 4900
    assert torch.equal(prior.index(raw)[clear], distance.argmin(1)[clear])


@pytest.mark.parametrize("form", ["linear", "log"])
def test_a_scale_on_a_threshold_belongs_below(form):
    prior = GaussianPrior(form)
    up = torch.nextafter(prior.thresholds, torch.tensor(math.inf))
    assert prior.index(prior.thresholds).tolist() == list(range(63))
    assert prior.index(up).tolist() == list(range(1, 64))
    ends = torch.tensor([-math.inf, -1e30, 1e30, math.inf, math.nan])
    assert prior.index(ends).tolist() == [0, 0, 63, 63, 63]


@pytest.mark.parametrize("levels", [0, 5])
def test_prior_tables_against_the_likelihood(levels):
    prior = learned_prior(levels=levels)
    tables = prior_tables(prior)
    for level in range(max(1, levels)):
        for channel in range(prior.channels):
            row = level * prior.channels + channel
            symbols = torch.arange(tables.sizes[row] - 1) + int(tables.first[row])
            z = torch.zeros(1, prior.channels, 1, len(symbols))
            z[0, channel, 0] = symbols + prior.median[channel]
            at = torch.tensor([float(level)]) if levels else None
            wanted = prior.likelihood(z, at)[0, channel, 0].double().numpy()
            found = tables.row(row) / 2**24
            np.testing.assert_allclose(found[:-1], wanted, rtol=0.1, atol=2**-15)  # the likeliest takes all remainders
            assert wanted @ np.log2(wanted / found[:-1]) < 0.01  # bits
            assert found[-1] < 2e-5 + 2**-15  # little is left to escapes


def test_prior_tables_know_the_level():
    narrow, wide = prior_tables(learned_prior(levels=2)).sizes.reshape(2, -1)[::-1]
    assert (narrow < wide).all()


def test_making_tables_leaves_the_prior_alone():
    prior = learned_prior(levels=3).double().requires_grad_(True)
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in prior.state_dict().items()}
    make_tables(prior)
    for name, tensor in prior.state_dict().items():
        assert tensor.data_ptr() == before[name][1] and torch.equal(tensor, before[name][0])
    assert all(parameter.requires_grad for parameter in prior.parameters())


def test_integer_frequencies():
    assert integer_frequencies(np.array([1.0, 1.0])).tolist() == [2**23, 2**23]
    assert integer_frequencies(np.array([1.0, 0.0])).tolist() == [2**24 - 1, 1]
    assert integer_frequencies(np.array([1.0, -1e-20, 0.0]), 8).tolist() == [2**24 - 512, 256, 256]
    masses = np.random.default_rng(0).dirichlet(np.full(1000, 0.1))
    for shift in (0, 8):
        frequencies = integer_frequencies(masses, shift)
        assert frequencies.sum() == 1 << 24 and frequencies.min() >= 1 << shift
        assert not (frequencies % (1 << shift)).any()


@pytest.fixture(scope="module")
def coding_tables(gaussian) -> CodingTables:
    return CodingTables(gaussian, prior_tables(learned_prior(levels=2)))


def test_tensors_round_trip(coding_tables):
    tensors = coding_tables.to_tensors()
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "tables.gaussian.frequencies": torch.int32,
        "tables.gaussian.sizes": torch.int32,
        "tables.gaussian.first": torch.int32,
        "tables.prior.frequencies": torch.uint16,
        "tables.prior.sizes": torch.int32,
        "tables.prior.first": torch.int32,
    }
    back = CodingTables.from_tensors(tensors)
    for ours, theirs in ((coding_tables.gaussian, back.gaussian), (coding_tables.prior, back.prior)):
        np.testing.assert_array_equal(ours.frequencies, theirs.frequencies)
        np.testing.assert_array_equal(ours.sizes, theirs.sizes)
        np.testing.assert_array_equal(ours.first, theirs.first)


def move(frequencies: torch.Tensor, amount: int) -> torch.Tensor:
    changed = frequencies.numpy().astype(np.int64)
    changed[:2] += [amount, -amount]
    return torch.from_numpy(changed.astype(frequencies.numpy().dtype))


DAMAGES = {
    "a-frequency-more": ("gaussian.frequencies", lambda t: t + (torch.arange(len(t)) == 5).int()),
    "a-zero-frequency": ("gaussian.frequencies", lambda t: move(t, int(t[1]))),
    "a-negative-frequency": ("gaussian.frequencies", lambda t: move(t, int(t[1]) + 1)),
    "frequencies-cut": ("gaussian.frequencies", lambda t: t[:-1]),
    "frequencies-longer": ("gaussian.frequencies", lambda t: torch.cat([t, t[:1]])),
    "frequencies-empty": ("gaussian.frequencies", lambda t: t[:0]),
    "frequencies-real": ("gaussian.frequencies", lambda t: t.float()),
    "frequencies-wide": ("gaussian.frequencies", lambda t: t.long()),
    "frequencies-2d": ("gaussian.frequencies", lambda t: t[None]),
    "sizes-empty": ("gaussian.sizes", lambda t: t[:0]),
    "sizes-cut": ("gaussian.sizes", lambda t: t[:-1]),
    "size-too-large": ("gaussian.sizes", lambda t: t + (torch.arange(64) == 63).int() * 9),
    "size-giant": ("gaussian.sizes", lambda t: torch.full_like(t, 2**31 - 1)),
    "size-negative": ("gaussian.sizes", lambda t: t * -1),
    "size-zero": ("gaussian.sizes", lambda t: torch.cat([t[:1] * 0, t[:1] + t[1:2], t[2:]])),
    "size-0d": ("gaussian.sizes", lambda t: t[0]),
    "sizes-swapped": ("gaussian.sizes", lambda t: t.flip(0)),
    "first-cut": ("gaussian.first", lambda t: t[:-1]),
    "first-real": ("gaussian.first", lambda t: t.bfloat16()),
    "prior-frequency-more": ("prior.frequencies", lambda t: move(t, 1)[1:]),
    "prior-wide": ("prior.frequencies", lambda t: t.int()),
    "prior-real": ("prior.frequencies", lambda t: t.float()),
    "prior-empty": ("prior.frequencies", lambda t: t[:0]),
    "prior-sizes-cut": ("prior.sizes", lambda t: t[:-1]),
}


@pytest.mark.parametrize("name, damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_tables_are_refused(coding_tables, name, damage):
    tensors = coding_tables.to_tensors()
    tensors[f"tables.{name}"] = damage(tensors[f"tables.{name}"])
    with pytest.raises(ValueError, match="damaged"):
        CodingTables.from_tensors(tensors)


def test_too_few_gaussians_are_refused(gaussian, coding_tables):
    rows = [gaussian.row(i) for i in range(63)]
    fewer = CodingTables(TableSet.from_rows(rows, gaussian.first[:63].tolist()), coding_tables.prior)
    with pytest.raises(ValueError, match="64 Gaussians"):
        CodingTables.from_tensors(fewer.to_tensors())


@pytest.mark.parametrize("name", ["gaussian.sizes", "prior.frequencies", "prior.first"])
def test_missing_tables_are_refused(coding_tables, name):
    tensors = coding_tables.to_tensors()
    del tensors[f"tables.{name}"]
    with pytest.raises(KeyError):
        CodingTables.from_tensors(tensors)
