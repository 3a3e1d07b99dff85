"""Our MLIC++ against the numbers of the authors' network, both filled by the same rule (tests/data/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mlic.coder import SymbolDecoder, SymbolEncoder
from mlic.convert import IGNORED, import_mlicpp
from mlic.strategies import Estimate, Read, Write
from mlic.weights import seal

DATA = Path(__file__).parent / "data"


def fill(name: str, shape: list[int]) -> np.ndarray:
    n = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith("gdn.beta"):
        return 1 + 0.1 * abs(n)
    if name.endswith("gdn.gamma"):
        return 0.1 * np.eye(shape[0]) + 0.01 * abs(n)
    if name.endswith(".quantiles"):
        return np.stack([np.full(shape[:2], -10.0), 0.5 * n[:, :, 1], np.full(shape[:2], 10.0)], -1)
    if "_matrix" in name or name.endswith("relative_position_table"):
        return 0.5 * n
    if "_factor" in name or "_bias" in name:
        return 0.3 * n
    if name.endswith(("norm1.weight", "norm2.weight")):
        return 1 + 0.1 * n
    if name.endswith("weight"):
        return 1.2 * n / np.sqrt(np.prod(shape[1:]))
    if name.endswith("fusion.6.bias"):
        return 0.1 * n + np.repeat([1.5, 0.0], shape[0] // 2)
    return 0.1 * n


@pytest.fixture(scope="module")
def network():
    shapes = json.loads((DATA / "mlicpp_state_dict.json").read_text())
    tensors = {k: torch.from_numpy(fill(k, s).astype(np.float32)) for k, s in shapes.items() if not IGNORED.search(k)}
    return import_mlicpp(tensors)


@pytest.fixture(scope="module")
def expected():
    return np.load(DATA / "mlicpp_parity.npz")


@pytest.fixture(scope="module")
def x(expected):
    return torch.from_numpy(expected["image"]).permute(2, 0, 1)[None].float() / 255


def relative_error(got: torch.Tensor, want: np.ndarray) -> float:
    return float((got[0] - torch.from_numpy(want)).norm() / torch.from_numpy(want).norm())


@torch.inference_mode()
def test_latents_reconstruction_and_bits(network, expected, x):
    y = network.analyse(x)
    z = network.h_a(y)
    estimate = Estimate(y, z, network.config.slices, network.gaussian, noisy=False)
    x_hat = network.synthesise(network.code(estimate))
    assert relative_error(y, expected["y"]) < 1e-4
    assert relative_error(z, expected["z"]) < 1e-4
    assert relative_error(x_hat, expected["x_hat"]) < 1e-4
    bits = torch.stack(estimate.slice_bits)[:, 0].numpy()
    np.testing.assert_allclose(bits, expected["bits_per_slice"], rtol=1e-3)


@torch.inference_mode()
def test_real_stream_round_trip(network, x):
    seal(network)
    y = network.analyse(x)
    symbols = SymbolEncoder(network.tables)
    y_hat = network.code(Write(y, network.h_a(y), network.config.slices, network.gaussian, [symbols]))
    stream, escapes, checksum = symbols.finish()
    source = SymbolDecoder(network.tables, stream, escapes, checksum)
    again = network.code(Read((2, 3), network.gaussian, [source]))
    source.finish()
    assert torch.equal(y_hat, again)
