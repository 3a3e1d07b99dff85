"""The promise: what decides a symbol is the same number on every machine. Shown by disturbing all that may differ."""

import contextlib
import copy
import hashlib
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mlic
from mlic.codec import decode_file, encode_picture, estimate_bytes
from mlic.coder import SymbolDecoder
from mlic.config import CONFIGS
from mlic.container import MlicFile
from mlic.context import HalfTanh, LinearAttention, SoftmaxAttention
from mlic.exact import ExactConv2d, ExactWinograd, Table, _weights, exact_conv, exact_twin, make_exact
from mlic.grid import FRACTION, LIMIT, exact_exp, exact_gelu, exact_tanh, function_table, settle, to_grid
from mlic.pictures import read_picture
from mlic.strategies import Estimate, Strategy
from mlic.weights import load_weights

GOLDEN = Path(__file__).parent / "golden"
MOVES_DATA = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "split", "chunk", "cat",
    "stack", "clone", "copy_", "_to_copy", "alias", "detach", "unsqueeze", "squeeze", "as_strided", "contiguous",
    "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "index", "full", "zeros", "ones", "empty", "arange", "lift_fresh",
    "split_with_sizes", "unbind", "where", "ones_like", "zeros_like", "scalar_tensor", "replication_pad2d", "unfold",
}  # fmt: skip


class Perturb(TorchDispatchMode):
    """Multiplies every float32 result of arithmetic by 1 + e, |e| <= `size`: a machine with very bad floating point."""

    def __init__(self, size: float, seed: int = 0) -> None:
        super().__init__()
        self.size, self.generator, self.count = size, torch.Generator().manual_seed(seed), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and name not in MOVES_DATA:
            self.count += 1
            noise = torch.empty(out.shape).uniform_(-self.size, self.size, generator=self.generator)
            with torch._C._DisableTorchDispatch():
                out = out * (1 + noise)
        return out


class Audit(TorchDispatchMode):
    """Checks that float64 sums and products are exact by construction: multiples of 2^-24, far enough below 2^53 of it.

    Attention's are; convolutions count units of 2^-12, in which theirs are multiples of 2^-16, by Winograd of 2^-18.
    """

    SUMS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "sum"}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name.removeprefix("aten::") in self.SUMS and out.dtype == torch.float64:
            self.count += 1
            steps = out * 2.0**24
            assert torch.equal(steps, steps.round()), function
            assert steps.abs().max() < 2.0**53, function
        return out


@pytest.fixture(scope="module")
def coded(small_models, photo):
    """name -> (model, an exact file of it at a high rate)."""
    files = {}
    for name, model in small_models.items():
        quality = 90 if model.config.variable_rate else None
        files[name] = model, MlicFile.from_bytes(encode_picture(model, read_picture(photo), quality).data)
    return files


@contextlib.contextmanager
def recorded(seen: list[np.ndarray]):
    """Collect all symbols a SymbolDecoder gives."""
    inner = SymbolDecoder._get

    def outer(self, tables, rows):
        seen.append(inner(self, tables, rows))
        return seen[-1]

    SymbolDecoder._get = outer
    try:
        yield
    finally:
        SymbolDecoder._get = inner


def symbols_of(model, file) -> tuple[np.ndarray, np.ndarray]:
    seen: list[np.ndarray] = []
    with recorded(seen):
        pixels = decode_file(model, file).pixels
    return np.concatenate(seen), pixels


@contextlib.contextmanager
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def channels_last_everywhere():
    """Every convolution's and attention's input in another memory layout."""

    def hook(module, inputs):
        return tuple(
            x.contiguous(memory_format=torch.channels_last) if isinstance(x, torch.Tensor) and x.ndim == 4 else x
            for x in inputs
        )

    with nn.modules.module.register_module_forward_pre_hook(hook):
        yield


@torch.inference_mode()
def said_of(model, *, exact: bool, size: tuple[int, int]) -> torch.Tensor:
    """All means and raw scales that a model finds for some latent of `size`."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    y = 20 * torch.randn(1, config.latent_channels, *size, generator=generator)
    z = 3 * torch.randn(1, config.z_channels, size[0] // 4, size[1] // 4, generator=generator)
    estimate = Estimate(y, z, config.slices, model.gaussian, noisy=False)
    (exact_twin(model) if exact else model).code(estimate, torch.tensor([2.5]) if config.variable_rate else None)
    return torch.cat([x.double().flatten() for _, three in estimate.said for x in three])


MACHINES = {
    "threads": two_threads,
    "onednn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "layout": channels_last_everywhere,
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("machine", MACHINES)
def test_other_machines_find_the_same_means_and_scales(small_models, name, machine):
    """Where in floating point they do not. The larger models take their time, and on as few positions as are left then,
    threads change nothing.
    """
    large = name in ("mlic+", "mlic++")
    if large and machine == "threads":
        pytest.skip("would take more positions")
    model, size = small_models[name], (8, 12) if large else (32, 48)
    before = [said_of(model, exact=exact, size=size) for exact in (True, False)]
    with MACHINES[machine]():
        after = [said_of(model, exact=exact, size=size) for exact in (True, False)]
    assert torch.equal(before[0], after[0])
    if torch.equal(before[1], after[1]):
        pytest.skip("floating point is the same there too")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_machine_with_bad_floating_point_decodes_the_same_symbols(coded, name):
    model, file = coded[name]
    expected, _ = symbols_of(model, file)
    with Perturb(1e-3) as mode:
        got, _ = symbols_of(model, file)
    assert np.array_equal(got, expected) and mode.count > 10


@pytest.mark.parametrize("name", CONFIGS)
def test_the_float_path_fails_the_same_disturbance(small_models, photo, name):
    """Or the test above would prove nothing."""
    model = small_models[name]
    quality = 90 if model.config.variable_rate else None
    file = MlicFile.from_bytes(encode_picture(model, read_picture(photo), quality, exact=False).data)
    with Perturb(1e-3), pytest.raises(mlic.DamagedFile, match="astray"):
        decode_file(model, file)


@torch.inference_mode()
def test_z_is_settled(small_models):
    """As docs/format.md says of it; beyond the limit another decoder would find other tables."""

    class Given(Strategy):
        z_size = (1, 1)

        def hyper(self, prior, level, places):
            return torch.full((1, prior.channels, 1, 1), 1e5, dtype=torch.float64)

        def hyper_given(self, places, mean, scale):
            return mean

        def latent(self, i, part, mean, scale):
            return mean

    seen = []
    twin = exact_twin(small_models["fast"])
    with twin.h_s[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        twin.code(Given(), torch.zeros(1))
    assert (seen[0] == 2048).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_files_written_by_a_bad_machine_decode_on_a_good_one(small_models, photo, name):
    model = small_models[name]
    with Perturb(1e-3, seed=5):
        data = encode_picture(model, read_picture(photo), 60 if model.config.variable_rate else None).data
    decode_file(model, MlicFile.from_bytes(data))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_every_sum_is_exact_by_construction(small_models, name):
    model = small_models[name]
    config = model.config
    level = torch.tensor([2.5]) if config.variable_rate else None
    y, z = 50 * torch.randn(1, config.latent_channels, 8, 12), 9 * torch.randn(1, config.z_channels, 2, 3)
    with Audit() as audit:
        y_hat = exact_twin(model).code(Estimate(y, z, config.slices, model.gaussian, noisy=False), level)
    assert audit.count > 20
    assert torch.equal(y_hat, to_grid(y_hat.clone())) and y_hat.abs().max() <= LIMIT + 0.5


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_picture_does_not_depend_on_its_batch(small_models, name):
    model = small_models[name]
    config, twin = model.config, exact_twin(model)
    y, z = 20 * torch.randn(3, config.latent_channels, 8, 8), torch.randn(3, config.z_channels, 2, 2)

    def code(rows):
        level = torch.full((len(y[rows]),), 1.5) if config.variable_rate else None
        return twin.code(Estimate(y[rows], z[rows], config.slices, model.gaussian, noisy=False), level)

    together = code(slice(0, 3))
    assert torch.equal(together[1:2], code(slice(1, 2)))


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_costs_next_to_nothing(small_models, photo, name, monkeypatch):
    """Of `fast` by the packaged weights: the small model's z goes beyond 2048, where exact arithmetic cuts it and floats do not;
    and with plain symbols, as dependent quantisation takes another path, of as little cost, for the least of reasons.
    """
    model, picture = mlic.load_model("fast") if name == "fast" else small_models[name], read_picture(photo)
    monkeypatch.setattr(model.gaussian, "lattice_bits", None)
    quality = 60 if model.config.variable_rate else None
    float_bytes, exact_bytes = (estimate_bytes(model, picture, quality, exact=exact, effort=0) for exact in (False, True))
    assert exact_bytes == pytest.approx(float_bytes, rel=0.003)


def test_functions_against_libm():
    x = np.linspace(-8, 8, 4001)
    np.testing.assert_allclose(exact_exp(x), np.exp(x), rtol=1e-13)
    np.testing.assert_allclose(exact_tanh(x), np.tanh(x), atol=1e-14)
    np.testing.assert_allclose(exact_gelu(x), [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x], atol=1e-12)


def test_functions_beyond_their_tables():
    """As docs/format.md defines them, section 10."""
    x = torch.arange(-20, 20, 0.25, dtype=torch.float64)
    low = to_grid(torch.from_numpy(exact_gelu(x.clamp(-8, 8).numpy())))
    assert torch.equal(make_exact(nn.GELU())(x), torch.where(x >= 8, x, low))
    half = to_grid(0.5 * torch.from_numpy(exact_tanh(x.clamp(-8, 8).numpy())))
    assert torch.equal(make_exact(HalfTanh())(x), half)
    assert torch.equal(
        Table("exp", -16.0, 0.0)(2 * x - 40), to_grid(torch.from_numpy(exact_exp((2 * x - 40).clamp(-16, 0).numpy())))
    )
    assert torch.equal(settle(300 * x), (300 * x).clamp(-2048, 2048))
    assert torch.equal(make_exact(nn.LeakyReLU(1 / 8))(x / 512), torch.maximum(x / 512, to_grid(x / 4096)))
    norm, wide = nn.LayerNorm(16), 30 * x.view(16, 10).T
    clamped = wide.clamp(-256, 256)
    assert (wide.abs() > 256).any(1).all() and (wide.abs() < 256).any(), "some beyond, some within"
    np.testing.assert_allclose(make_exact(norm)(wide), norm.double()(clamped).detach(), atol=2**-11)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("gelu", "778110645d7ceccb"),
        ("half_tanh", "61e2b92a32ec29c2"),
        ("exp", "f4968ebb818c8dd1"),
    ],
)
def test_function_tables_are_the_published_ones(name, digest):
    """They are computed where they are used; a machine that computes others must not decode at all."""
    assert hashlib.sha256(function_table(name).tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Conv2d(6, 9, 3, 1, 1), (2, 6, 8, 10)),
        (nn.Conv2d(6, 9, 3, 2, 1), (2, 6, 8, 10)),
        (nn.Conv2d(6, 9, 1), (2, 6, 8, 10)),
        (nn.Conv2d(6, 6, 3, 1, 1, groups=6), (2, 6, 8, 10)),
        (nn.Conv2d(6, 9, 5), (2, 6, 5, 5)),
        (nn.Linear(6, 5), (2, 3, 6)),
        (nn.LayerNorm(16), (2, 3, 16)),
        (nn.GELU(), (2, 3, 500)),
    ],
    ids=["conv", "stride", "1x1", "depthwise", "valid", "linear", "layernorm", "gelu"],
)
def test_parts_are_near_their_float_selves(net, shape):
    torch.manual_seed(0)
    x = to_grid(2 * torch.randn(shape, dtype=torch.float64))
    want = net.double()(x)
    assert (make_exact(net)(x) - want).abs().max() < 2.0 ** (2 - FRACTION)


@pytest.mark.parametrize("attention", [SoftmaxAttention, LinearAttention])
def test_attentions_are_near_their_float_selves(attention):
    torch.manual_seed(0)
    q, k, v = to_grid(torch.randn(3, 2, 16, 700, dtype=torch.float64))
    want = attention(2)(q, k, v)
    assert (make_exact(attention(2))(q, k, v) - want).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(1, 6, 8, 10), (3, 6, 1, 1), (2, 6, 5, 7)])
@torch.inference_mode()
def test_winograd_gives_the_same_numbers(shape):
    torch.manual_seed(0)
    net = nn.Conv2d(6, 9, 3, 1, 1)
    for scale in (0.1, 2.0):
        nn.init.normal_(net.weight, std=scale)
        x = to_grid(100 * torch.randn(shape, dtype=torch.float64)).clamp(-LIMIT, LIMIT)
        fast, plain = exact_conv(net), ExactConv2d(net, *_weights(net))
        assert isinstance(fast, ExactWinograd)
        assert torch.equal(fast(x), plain(x))


def test_weights_too_large_for_winograd_alone():
    net = nn.Conv2d(2, 1, 3, 1, 1)
    nn.init.constant_(net.weight, 300.0)
    assert isinstance(exact_conv(net), ExactConv2d)


@torch.inference_mode()
def test_winograd_near_its_limit():
    """Large products that cancel to a small sum, against whole numbers."""
    torch.manual_seed(0)
    net = nn.Conv2d(2, 1, 3, 1, 1, bias=False)
    net.weight[:, 0] = 15 + torch.rand(3, 3)
    net.weight[:, 1] = 0.01 * torch.rand(3, 3) - net.weight[:, 0]
    net.bias = nn.Parameter(torch.zeros(1))
    fast = exact_conv(net)
    assert isinstance(fast, ExactWinograd)
    x = to_grid(LIMIT - torch.rand(1, 2, 3, 3, dtype=torch.float64))
    weight, whole = to_grid(net.weight.double(), 16) * 2**16, x * 2**FRACTION
    total = sum(int(w) * int(v) for w, v in zip(weight.flatten(), whole.flatten()))
    assert abs(total) < LIMIT * 2**28
    assert int(fast(x)[0, 0, 1, 1] * 2**FRACTION) == round(Fraction(total, 2**16))


def test_exact_softmax_attention_never_holds_all_scores():
    class Largest(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.count = max(self.count, out.numel())
            return out

    with Largest() as largest, torch.inference_mode():
        make_exact(SoftmaxAttention(2))(*torch.zeros(3, 1, 8, 2048, dtype=torch.float64))
    assert largest.count <= 2 * 2048 * 256


def test_weights_too_large_for_exact_sums(small_models, photo):
    net = nn.Conv2d(600, 1, 1)
    nn.init.constant_(net.weight, 60.0)
    with pytest.raises(ValueError, match="too large for exact arithmetic"):
        make_exact(net)


@pytest.mark.parametrize(
    "layer",
    [
        nn.SiLU(),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 16, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 1, bias=False),
    ],
    ids=repr,
)
def test_layers_without_an_exact_form_are_refused(layer):
    """A new part must not become inexact, or something else, without a word."""
    with pytest.raises(ValueError, match="has no exact form"):
        make_exact(nn.Sequential(nn.Conv2d(8, 8, 1), layer))


class PreActivation(nn.Module):
    """A part of one's own, with a sum, a ReLU before its convolution and a buffer off the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.activation, self.conv = nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)
        self.register_buffer("place", torch.full((1, 8, 1, 1), 1 / 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(self.activation(x)) + self.place


@torch.inference_mode()
def test_a_part_of_ones_own():
    torch.manual_seed(0)
    net, x = PreActivation(), to_grid(torch.randn(1, 8, 6, 7, dtype=torch.float64))
    before = x.clone()
    y = make_exact(net)(x)
    assert torch.equal(x, before) and torch.equal(y, to_grid(y))
    assert (y - net.double()(x)).abs().max() < 2.0 ** (2 - FRACTION)


def test_a_single_channel_is_no_depthwise_convolution():
    layer, x = nn.Conv2d(1, 1, 3, padding=1), to_grid(torch.rand(1, 1, 6, 7, dtype=torch.float64))
    assert (make_exact(layer)(x) - layer.double()(x)).abs().max() < 2.0**-10


@pytest.mark.parametrize("name", [*CONFIGS, "fast-packaged"])
def test_golden_files(name):
    """Files written once (tests/make_golden.py), decoded by whatever runs this: symbols and latent, bit for bit."""
    record = json.loads((GOLDEN / "golden.json").read_text())[name]
    file = MlicFile.from_bytes((GOLDEN / f"{name}.mlic").read_bytes())
    model = mlic.load_model("fast") if name == "fast-packaged" else load_weights(GOLDEN / f"{name}.safetensors")
    assert model.digest[:8] == file.digest, "weights changed: run tests/make_golden.py"
    symbols, pixels = symbols_of(model, file)
    assert hashlib.sha256(symbols.astype("<i4").tobytes()).hexdigest() == record["symbols"]
    assert abs(float(pixels.mean()) - record["mean"]) < 0.01


@pytest.mark.parametrize(
    "environment",
    [
        {"ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
        {"ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "MKL_CBWR": "AVX2"},
    ],
    ids=["sse", "avx2"],
)
def test_golden_files_with_other_instruction_sets(environment):
    """In a process that may use fewer of the processor's instructions."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_golden_files"]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0 and "5 passed" in result.stdout, result.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
def test_cuda_and_cpu_read_each_other(small_models, photo, name):
    here, there = small_models[name], copy.deepcopy(small_models[name]).to("cuda")
    quality = 60 if here.config.variable_rate else None
    for writer, reader in ((here, there), (there, here)):
        file = MlicFile.from_bytes(encode_picture(writer, read_picture(photo), quality).data)
        assert np.array_equal(symbols_of(reader, file)[0], symbols_of(writer, file)[0])
