"""The four models' sizes, and that the driver means the same to every strategy."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from mlic.checkerboard import QUARTERS, Step, keep, pack, unpack
from mlic.codec import encode_picture, estimate_bytes
from mlic.coder import SymbolDecoder, SymbolEncoder
from mlic.config import ANCHOR, CONFIGS, NON_ANCHOR, ModelConfig
from mlic.container import MlicFile
from mlic.context import LinearAttention, SoftmaxAttention, WindowContext
from mlic.exact import exact_twin
from mlic.model import build_model, count_parameters, kmac_per_pixel
from mlic.pictures import read_picture
from mlic.strategies import Estimate, Read, Write
from mlic.weights import find_weights


@pytest.mark.parametrize(("name", "millions"), [("mlic", 41.9), ("mlic+", 83.5), ("mlic++", 83.5)])
def test_parameters_of_the_papers_models(name, millions):
    assert count_parameters(name) / 1e6 == pytest.approx(millions, rel=0.005)


def test_fast_keeps_its_budget():
    assert find_weights("fast").stat().st_size <= 40e6
    kmac = kmac_per_pixel("fast")
    assert kmac.encode <= 100 and kmac.decode <= 100


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json(name):
    assert ModelConfig.from_json(CONFIGS[name].to_json()) == CONFIGS[name]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "much"])
def test_a_weight_of_errors_is_positive(value):
    with pytest.raises(ValueError, match="error_bits"):
        dataclasses.replace(CONFIGS["fast"], error_bits=value)


@pytest.mark.parametrize("value", [1, None, "true"])
def test_shifted_is_true_or_false(value):
    with pytest.raises(ValueError, match="shifted"):
        dataclasses.replace(CONFIGS["fast"], shifted=value)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "a\\b", "a b", 5])
def test_a_name_is_fit_for_a_file(name):
    with pytest.raises(ValueError, match="a model's name has letters"):
        dataclasses.replace(CONFIGS["fast"], name=name)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "unknown": 1}'])
def test_bad_config_is_a_value_error(text):
    with pytest.raises(ValueError):
        ModelConfig.from_json(text)


def test_unknown_model_names_the_known():
    with pytest.raises(ValueError, match="fast"):
        build_model("slow")


def test_checkerboard_halves_make_the_whole():
    x = torch.randn(2, 3, 6, 8)
    assert torch.equal(unpack(pack(x, ANCHOR), ANCHOR) + unpack(pack(x, NON_ANCHOR), NON_ANCHOR), x)
    assert torch.equal(unpack(pack(x, ANCHOR), ANCHOR), keep(x, ANCHOR))
    assert keep(torch.ones(1, 1, 2, 2), ANCHOR).flatten().tolist() == [0, 1, 1, 0]  # anchor: row + column odd


def test_steps_make_the_anchors():
    x = torch.randn(2, 3, 8, 12)
    steps = [unpack(pack(x, step), step) for step in Step]
    assert torch.equal(sum(steps), keep(x, ANCHOR))
    assert [pack(x, step)[0, 0].numel() for step in Step] == [12, 12, 24]
    first, second, third = ((plane[0, 0] != 0).nonzero() for plane in steps)

    def neighbours(position, others):  # distances to the nearest of another step, squared
        return sorted((others - position).square().sum(1).tolist())[:4]

    inside = torch.tensor([4, 5])
    assert inside.tolist() in second.tolist() and neighbours(inside, first) == [4] * 4
    inside = torch.tensor([5, 4])
    assert inside.tolist() in third.tolist() and neighbours(inside, torch.cat([first, second])) == [2] * 4


def test_a_step_sees_the_steps_before_it(small_models):
    """And nothing else of the slice."""
    model = small_models["fast"]
    y, z = 4 * torch.randn(1, 48, 8, 8), torch.zeros(1, 16, 2, 2)

    def scales(latent):
        seen = {}

        class Spy(Estimate):
            def latent(self, i, part, mean, scale):
                seen.update({part: scale} if i == 0 else {})
                return super().latent(i, part, mean, scale)

        model.code(Spy(latent, z, model.config.slices, model.gaussian, noisy=False), torch.zeros(1))
        return seen

    base, order = scales(y), [*Step, NON_ANCHOR]
    assert list(base) == order
    for k, part in enumerate(order):
        moved = scales(y + 5 * unpack(torch.ones_like(pack(y, part)), part))
        assert [not torch.equal(base[p], moved[p]) for p in order] == [False] * (k + 1) + [True] * (3 - k)


@torch.inference_mode()
def test_quarters_of_z_see_those_before_them(small_models):
    """Their means and scales depend on the quarters before, next to them, and on no other; together they are all of z."""
    model = small_models["fast"]
    z = 3 * torch.randn(1, model.config.z_channels, 5, 7)
    y = torch.zeros(1, model.config.latent_channels, 0, 0)

    def said(z):
        seen = {}

        class Spy(Estimate):
            def hyper_given(self, places, mean, scale):
                seen[QUARTERS.index(places)] = torch.cat([mean, scale], 1)
                return super().hyper_given(places, mean, scale)

        strategy = Spy(y, z, model.config.slices, model.gaussian, noisy=False)
        return seen, model.entropy_model.walk_hyper(model.prior, torch.zeros(1), strategy)

    base, z_hat = said(z)
    assert list(base) == [1, 2, 3] and z_hat.shape == z.shape and (z_hat - z).abs().max() <= 0.5 + 1e-5
    for k, places in enumerate(QUARTERS):
        other = z.clone()
        other[(..., *places)] += 5
        moved = said(other)[0]
        assert [not torch.equal(base[i], moved[i]) for i in base] == [i > k for i in base]


@pytest.mark.parametrize("name", ["fast", "mlic"])
@torch.inference_mode()
def test_z_of_one_position(small_models, name):
    """Three of its quarters are empty, or two, of a row: there and back all the same."""
    model = small_models[name]
    level = torch.zeros(1) if model.config.variable_rate else None
    for size in ((1, 1), (1, 3), (2, 1)):
        z = torch.randn(1, model.config.z_channels, *size)
        y = torch.randn(1, model.config.latent_channels, 4 * size[0], 4 * size[1])
        encoder = SymbolEncoder(model.tables)
        y_hat = exact_twin(model).code(Write(y, z, model.config.slices, model.gaussian, [encoder]), level)
        decoder = SymbolDecoder(model.tables, *encoder.finish())
        assert torch.equal(exact_twin(model).code(Read(size, model.gaussian, [decoder]), level), y_hat)
        decoder.finish()


def test_attentions_against_their_formulas():
    q, k, v = torch.randn(3, 2, 8, 15)  # (B, C, L), two heads of 4
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        scores = (q[:, rows].transpose(1, 2) @ k[:, rows] / 2).softmax(2)
        torch.testing.assert_close(SoftmaxAttention(2)(q, k, v)[:, rows], (scores @ v[:, rows].transpose(1, 2)).transpose(1, 2))
        context = k[:, rows].softmax(2) @ v[:, rows].transpose(1, 2)
        torch.testing.assert_close(LinearAttention(2)(q, k, v)[:, rows], context.transpose(1, 2) @ q[:, rows].softmax(1))


def test_window_context_depends_on_near_anchors_only():
    torch.manual_seed(0)
    net = WindowContext(8).eval()
    anchors = keep(torch.randn(1, 8, 12, 12), ANCHOR)
    before = net(anchors)
    anchors[0, :, 6, 7] += 1
    changed = (net(anchors) != before).any(1)[0].nonzero()
    assert len(changed) and (changed - torch.tensor([6, 7])).abs().max() <= 2
    assert torch.equal(before, keep(before, NON_ANCHOR))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_nothing_decoded_later_moves_what_came_before(small_models, name):
    """The order of coding: a slice's parameters may depend on earlier slices and passes alone."""
    model = small_models[name]
    config = model.config
    level = torch.zeros(1) if config.variable_rate else None
    y = 4 * torch.randn(1, config.latent_channels, 8, 8)
    z = torch.zeros(1, config.z_channels, 2, 2)

    def parameters(latent):
        seen = []

        class Spy(Estimate):
            def latent(self, i, anchor, mean, scale):
                seen.append(torch.cat([mean, scale], 1))
                return super().latent(i, anchor, mean, scale)

        model.code(Spy(latent, z, config.slices, model.gaussian, noisy=False), level)
        return seen

    base, last = parameters(y), y.clone()
    first_of_last = config.latent_channels - config.slices[-1]
    last[:, first_of_last:] = keep(y[:, first_of_last:], ANCHOR) + 9 * keep(torch.ones_like(y[:, first_of_last:]), NON_ANCHOR)
    assert all(torch.equal(a, b) for a, b in zip(base, parameters(last)))
    first = y.clone()
    first[:, : config.slices[0]] += 5
    moved = [not torch.equal(a, b) for a, b in zip(base, parameters(first))]
    assert moved[0] is False and all(moved[1:])


@pytest.mark.parametrize("name", CONFIGS)
def test_file_size_is_the_estimate(small_models, name):
    """Real bytes against the model's estimate, on a picture large enough for headers not to count."""
    model = small_models[name]
    pixels = np.random.default_rng(0).integers(0, 256, (192, 256, 3)).astype(np.uint8)
    picture = read_picture(pixels)
    data = encode_picture(model, picture, 60 if model.config.variable_rate else None).data
    escapes = len(MlicFile.from_bytes(data).tiles[0].escapes)
    estimate = estimate_bytes(model, picture, 60 if model.config.variable_rate else None)
    assert len(data) >= 0.99 * estimate - 64 and len(data) - escapes <= 1.01 * estimate + 64


def test_softmax_attention_needs_memory_in_proportion_to_length():
    """In a process of its own: 16,384 positions would need 1 GiB for each head's scores."""
    code = (
        "import torch; from mlic.coding_process import peak_memory_mib; from mlic.context import SoftmaxAttention\n"
        "torch.set_num_threads(1)\n"
        "with torch.inference_mode(): SoftmaxAttention(2)(*torch.randn(3, 1, 8, 16384))\n"
        "print(peak_memory_mib())"
    )
    used = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(used) < 1024  # MiB, torch included, but not what these tests hold
