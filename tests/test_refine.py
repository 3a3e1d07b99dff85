"""The encoder's search: it makes files better, never worse, and stays out of what it has no say in."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SAMPLE
from PIL import Image

import mlic
from mlic import prior, refine
from mlic.cli import main
from mlic.codec import decode_file, encode_picture, level_tensor, quality_code
from mlic.container import MlicFile
from mlic.feedback import NoiseFeedback
from mlic.layers import has_bfloat16
from mlic.model import level_lambda
from mlic.pictures import Picture
from mlic.refine import Search, passes_of
from mlic.strategies import Estimate, Relaxed
from mlic.tiles import Box
from mlic.weights import load_model


@pytest.fixture(scope="module")
def model():
    return load_model("fast")


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def cost(model, encoded, pixels: np.ndarray, quality: float) -> float:
    """Bits of the file plus lambda times 255^2 MSE times pixels, with the lambda of the quality."""
    lmbda = level_lambda(model.config, level_tensor(model, quality_code(model, quality))).item()
    error = np.mean(np.square(encoded.reconstruction.astype(float) - pixels))
    return 8 * len(encoded.data) + lmbda * error * pixels[..., 0].size


@pytest.mark.parametrize("quality", [30, 60, 90])
def test_effort_lowers_the_cost_of_files(model, quality):
    costs = {0: 0.0, 4: 0.0}
    for left, top in ((150, 100), (350, 200)):  # one scene alone gains between 0 and 4%
        with Image.open(SAMPLE) as image:
            scene = np.array(image.convert("RGB").crop((left, top, left + 128, top + 128)))
        for effort in costs:
            encoded = encode_picture(model, Picture(scene), quality, effort=effort, reconstruct=True)
            costs[effort] += cost(model, encoded, scene, quality)
    assert costs[4] < 0.992 * costs[0]


def test_tiles_gain_as_well_and_decode(model):
    costs = {0: 0.0, 4: 0.0}
    for left, top in ((150, 100), (350, 200)):  # one scene alone gains between 2 and 3%
        with Image.open(SAMPLE) as image:
            scene = np.array(image.convert("RGB").crop((left, top, left + 330, top + 240)))  # 2 x 3 tiles, the last ones cut
        for effort in costs:
            encoded = encode_picture(model, Picture(scene), 60, effort=effort, tile=128, reconstruct=True)
            file = MlicFile.from_bytes(encoded.data)
            assert len(file.tiles) == 6
            assert np.array_equal(decode_file(model, file).pixels, encoded.reconstruction)
            costs[effort] += cost(model, encoded, scene, 60)
    assert costs[4] < 0.972 * costs[0]


def test_blocks_gain_nearly_as_much_as_the_whole(model, monkeypatch):
    """And no search sees more than a block with its neighbours, however large the tile."""
    with Image.open(SAMPLE) as image:
        scene = np.array(image.convert("RGB").crop((150, 100, 342, 228)))
    sizes, search = [], Search._search

    def recorded(self, x, *rest):
        sizes.append(tuple(x.shape[2:]))
        return search(self, x, *rest)

    monkeypatch.setattr(Search, "_search", recorded)
    costs = []
    for block, effort in ((768, 0), (768, 2), (128, 2)):
        monkeypatch.setattr(refine, "BLOCK", block)
        costs.append(cost(model, encode_picture(model, Picture(scene), 85, effort=effort, reconstruct=True), scene, 85))
    assert sizes == [(128, 192), (128, 128), (128, 192)]
    assert costs[0] - costs[2] > 0.8 * (costs[0] - costs[1]) > 0.02 * costs[0]


@pytest.mark.parametrize("quality", [60, 85])
def test_the_hyper_latent_is_searched_as_well(model, monkeypatch, quality):
    with Image.open(SAMPLE) as image:
        scene = np.array(image.convert("RGB").crop((150, 100, 342, 292)))
    costs = []
    monkeypatch.setattr(refine, "LONG", 99)  # feedback would move y as well
    for curvature in (refine.HYPER_CURVATURE, float("inf")):  # that is, no step at all
        monkeypatch.setattr(refine, "HYPER_CURVATURE", curvature)
        coded = encode_picture(model, Picture(scene), quality, effort=4, reconstruct=True)
        costs.append(cost(model, coded, scene, quality))
    assert costs[0] < 0.999 * costs[1]


class Blind:
    """A model whose g_a gives the same latent whatever it is shown."""

    def __init__(self, model, y: torch.Tensor) -> None:
        self.config, self.prior, self.gaussian, self.h_a, self.y = model.config, model.prior, model.gaussian, model.h_a, y
        self.code, self.synthesise = model.code, model.synthesise

    def analyse(self, _x, _level):
        return self.y


def test_the_part_beside_a_tile_counts(model, photo):
    """An error just beyond the tile's edge changes what is chosen for the tile; one far beyond changes next to nothing."""
    x, level = as_tensor(photo[:64, :64].repeat(4, 1)), torch.tensor([40.0])  # 64x256
    seen, part = Box(0, 0, 64, 256), Box(0, 0, 64, 64)
    blind, chosen = Blind(model, model.analyse(x, level)), []
    for column in (None, 64, 200):
        other = x.clone()
        if column:
            other[..., column : column + 8] += 0.2
        # one pass, as whether each is kept depends on the whole
        chosen.append(Search(blind, 1, level).latents(other, part=part, seen=seen, whole=seen)[0])
    assert chosen[0].shape[3] == 4
    assert (chosen[0] - chosen[1]).abs().max() > 0.01
    assert (chosen[0] - chosen[2]).abs().max() < 0.01


def test_errors_beyond_the_picture_do_not_count(model, photo):
    x, level, seen = as_tensor(photo[:64, :64]), torch.tensor([40.0]), Box(0, 0, 64, 64)
    other = x.clone()
    other[:, :, 40:] = 0
    blind = Blind(model, model.analyse(x, level))

    def chosen(x, whole):
        return Search(blind, 2, level).latents(x, part=seen, seen=seen, whole=whole)[0]

    assert torch.equal(chosen(x, Box(0, 0, 40, 64)), chosen(other, Box(0, 0, 40, 64)))
    assert not torch.equal(chosen(x, seen), chosen(other, seen))


def test_what_is_clipped_is_no_error(model):
    """A picture that is white does not become better where the decoder's lies further beyond white, nor worse."""
    level, box = torch.tensor([40.0]), Box(0, 0, 64, 64)
    white = torch.ones(1, 3, 64, 64)
    blind = Blind(model, model.analyse(white, level))
    search = Search(blind, 4, level)
    y, z = blind.y, model.h_a(blind.y)
    errors = []
    for brightness in (0.9, 1.0, 1.3):
        blind.synthesise = lambda y_hat, _, x=brightness: torch.full_like(white, x) + 0 * y_hat.sum()
        errors.append(search._look((y, z), white, search.weights(box, box))[1].sum().item())
        feedback = NoiseFeedback(search, white, y, y, z, part=box, seen=box, whole=box)
        assert not feedback.slopes_before.any()
    assert errors[0] > 0 and errors[1:] == [0, 0]
    slopes = []
    for x_hat in (0.95, 1.05):
        blind.synthesise = lambda y_hat, _, x=x_hat: x + 0.01 * y_hat.mean() + torch.zeros_like(white)
        slopes.append(NoiseFeedback(search, white, 0 * y, y, z, part=box, seen=box, whole=box).slopes_before.abs().max())
    assert slopes[0] > 0 and slopes[1] == 0


def test_an_error_weighs_less_at_higher_levels(model, small_models):
    """In the choice of symbols, with a search or without; for models with one rate, as the config says."""
    for level, wanted in ((0.0, refine.ERROR_BITS[0]), (63.0, refine.ERROR_BITS[1]), (31.5, sum(refine.ERROR_BITS) / 2)):
        for effort in (0, 3, 4):
            search = Search(model, effort, torch.tensor([level]))
            assert search.gaussian.error_bits == search.looking.error_bits == pytest.approx(wanted)
    assert refine.ERROR_BITS[0] > refine.ERROR_BITS[1] and model.gaussian.error_bits == model.config.error_bits
    one_rate = small_models["mlic"]
    assert Search(one_rate, 0, None).gaussian.error_bits == one_rate.config.error_bits


def test_packaged_weights_name_their_silent_channels(model):
    """Those of benchmarks/silent_channels.py, with the search that users have."""
    assert model.gaussian.silent == (66, 76, 77, 91, 418)
    for effort in (0, 4):
        search = Search(model, effort, torch.tensor([40.0]))
        assert search.gaussian.silent == search.looking.silent == model.gaussian.silent


class Brittle(Blind):
    """A model that makes one block white after the first step, and never again."""

    def __init__(self, model, y: torch.Tensor, row: int, column: int) -> None:
        super().__init__(model, y)
        self.sound, self.synthesise, self.calls = model.synthesise, self.brittle, 0
        self.block = (..., slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))

    def brittle(self, y_hat, level):
        white = torch.zeros_like(x_hat := self.sound(y_hat, level))
        white[self.block] = float(self.calls == 1)
        self.calls += 1
        return x_hat + white


def test_a_block_that_a_step_breaks_stays_as_it_was(model):
    """And its neighbours do, while the others have their step."""
    with Image.open(SAMPLE) as image:
        x = as_tensor(np.array(image.convert("RGB").crop((150, 100, 278, 228))))
    level, whole = torch.tensor([40.0]), Box(0, 0, 128, 128)
    y = model.analyse(x, level)
    found, _ = Search(Brittle(model, y, 3, 2), 1, level).latents(x, part=whole, seen=whole, whole=whole)
    moved = (found - y).abs().amax((0, 1)) > 1e-3
    around = torch.zeros_like(moved)
    around[2:5, 1:4] = True
    assert not moved[around].any() and moved[~around].all()


def test_a_step_that_does_not_help_is_taken_back(model, photo, monkeypatch):
    plain = encode_picture(model, Picture(photo), 60, effort=0).data
    monkeypatch.setattr(refine, "FIRST_STEP", 1e6)
    monkeypatch.setattr(refine, "LONG", 99)  # no feedback, as without a search
    assert encode_picture(model, Picture(photo), 60, effort=5).data == plain


def test_no_value_goes_far_in_one_pass(model, photo, monkeypatch):
    """However steep the slope: the picture would break there, and the pass be lost for all the others."""
    monkeypatch.setattr(refine, "CURVATURE", 1e-3)
    monkeypatch.setattr(refine, "HYPER_CURVATURE", 1e-3)
    tried, look = [], Search._look
    monkeypatch.setattr(Search, "_look", lambda self, now, *rest: tried.append(now) or look(self, now, *rest))
    x, level, all_of_it = as_tensor(photo[:64, :64]), torch.tensor([40.0]), Box(0, 0, 64, 64)
    Search(model, 1, level).latents(x, part=all_of_it, seen=all_of_it, whole=all_of_it)
    for start, end in zip(*tried[:2]):  # a symbol may lie 1 from the value, where fewer bits made it smaller
        assert 0.5 < (end - start).abs().max() < refine.FIRST_STEP * (refine.LONGEST + 1)


def test_bfloat16_costs_next_to_nothing(model, monkeypatch):
    """Where a machine is faster in it, all of the search's nets use it, and nothing that writes the file."""
    with Image.open(SAMPLE) as image:  # one scene alone costs up to 1% more or less
        scenes = [np.array(image.convert("RGB").crop((x, y, x + 192, y + 192))) for x, y in ((150, 100), (350, 200))]
    searching, writing = [], []  # calls in bfloat16 or not

    def recorded(net):
        def run(*given):  # in inference mode the file is written
            (writing if torch.is_inference_mode_enabled() else searching).append(torch.is_autocast_enabled("cpu"))
            return net(*given)

        return run

    for name in ("synthesise", "code"):
        monkeypatch.setattr(model, name, recorded(getattr(model, name)))
    ratios = []
    for quality, scene in itertools.product((20, 60, 95), scenes):
        costs = []
        for half in (False, True):
            monkeypatch.setattr(refine, "has_bfloat16", lambda device, half=half: half)
            searching.clear(), writing.clear()
            coded = encode_picture(model, Picture(scene), quality, effort=4, reconstruct=True)
            costs.append(cost(model, coded, scene, quality))
            assert len(searching) >= 10 and set(searching) == {half}
            assert writing and not any(writing)
        ratios.append(costs[1] / costs[0])
    assert 1 not in ratios and np.mean(ratios) < 1.004


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="no units for bfloat16")
def test_units_that_onednn_may_not_use_do_not_count():
    """With them forbidden, a search in bfloat16 took minutes."""
    script = "import torch, mlic.layers; print(mlic.layers.has_bfloat16(torch.device('cpu')))"
    said = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | more).stdout
        for more in ({}, {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    ]
    assert said == ["True\n", "False\n"]


def test_processors_without_units_for_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert not has_bfloat16(torch.device("cpu"))


def test_what_is_differentiated_is_the_estimate(small_models):
    """Bits, y_hat and symbols are those of the rounded estimate; `whole` puts the values where y_hat has them."""
    model = small_models["fast"]
    level, x = torch.tensor([2.0]), torch.rand(1, 3, 128, 192)
    y = model.analyse(x, level)
    z = model.h_a(y)
    plain, relaxed = Estimate(y, z, model.config.slices, model.gaussian, noisy=False), None
    with torch.no_grad():
        y_hat = model.code(plain, level)
    with torch.enable_grad():
        relaxed = Relaxed(y, z, model.config.slices, model.gaussian)
        same = model.code(relaxed, level)
        bits = relaxed.y_bits.sum() + relaxed.z_bits.sum()
        slopes = torch.autograd.grad(same.sum() + bits, [*relaxed.values, *relaxed.z_values])
    assert torch.allclose(y_hat, same, atol=1e-5) and torch.allclose(plain.y_bits, relaxed.y_bits, rtol=1e-5)
    assert len(relaxed.z_values) == model.config.hyper_batches == 4
    assert len(relaxed.values) == model.config.symbol_batches - 4
    values = relaxed.whole(relaxed.values).detach()
    assert values.shape == y.shape and (values - same).abs().max() <= 0.5 + 1e-5  # an LRP adds half at most
    y_slope, z_slope = relaxed.whole(slopes[:-4]), relaxed.whole_z(slopes[-4:])
    assert (y_slope != 0).float().mean() > 0.9
    z_hat = relaxed.whole_z(relaxed.z_values)
    assert torch.allclose(plain.z_bits, relaxed.z_bits, rtol=1e-5) and (z_hat - z).abs().max() <= 0.5 + 1e-5
    assert z_slope.shape == z.shape and (z_slope != 0).float().mean() > 0.9


def test_the_slope_of_the_bits_is_that_of_a_difference(small_models, monkeypatch):
    monkeypatch.setattr(prior, "LIKELIHOOD_MIN", 1e-30)  # where likelihoods are cut off, slopes lead back on purpose
    model = small_models["fast"]
    torch.manual_seed(0)
    level, x = torch.tensor([2.0]), torch.rand(1, 3, 128, 128)
    y = model.analyse(x, level)
    z, way = model.h_a(y), torch.randn_like(y)

    class Unrounded:
        silent = ()
        bits = staticmethod(model.gaussian.bits)

        def plain(self):
            return self

        def quantise(self, residual, _scale):
            return residual, None

        def values(self, levels, _scale):
            return levels

    def bits(values: torch.Tensor) -> Relaxed:
        with torch.enable_grad():
            relaxed = Relaxed(values, z, model.config.slices, Unrounded())
            model.code(relaxed, level)
        return relaxed

    at = bits(y)
    slope = (at.whole(torch.autograd.grad(at.y_bits.sum(), at.values)) * way).sum().item()
    step = 0.003
    difference = (bits(y + step * way).y_bits - bits(y - step * way).y_bits).item() / (2 * step)
    assert slope == pytest.approx(difference, rel=0.05)


def test_efforts_that_cannot_be(model, small_models, photo):
    assert passes_of(model, None) == refine.EFFORT and passes_of(small_models["mlic"], None) == 0
    assert passes_of(small_models["mlic"], 0) == 0
    for effort in (-1, 21, 1.5, "3"):
        with pytest.raises(ValueError, match="effort must be a whole number from 0 to 20"):
            mlic.encode(photo, effort=effort)
    with pytest.raises(ValueError, match="has one rate: effort cannot be chosen"):
        encode_picture(small_models["mlic"], Picture(photo), effort=2)


def test_inside_inference_mode(photo):
    """Weights that are first loaded there can be differentiated all the same."""
    from mlic.weights import _load_cached

    _load_cached.cache_clear()
    with torch.inference_mode():
        inside = mlic.encode(photo, 60)
    assert inside == mlic.encode(photo, 60) != mlic.encode(photo, 60, effort=0)


def test_command_line(tmp_path, photo, monkeypatch):
    monkeypatch.undo()  # the default is the users'
    Image.fromarray(photo).save(tmp_path / "a.png")
    sizes = []
    for effort in ("0", "4"):
        done = CliRunner().invoke(
            main, ["encode", str(tmp_path / "a.png"), "-o", str(tmp_path / f"{effort}.mlic"), "--effort", effort]
        )
        assert done.exit_code == 0, done.output
        sizes.append((tmp_path / f"{effort}.mlic").read_bytes())
    assert sizes[0] == mlic.encode(photo, effort=0) and sizes[1] == mlic.encode(photo) != sizes[0]
    assert CliRunner().invoke(main, ["encode", str(tmp_path / "a.png"), "--effort", "21"]).exit_code == 2
