from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from mlic.cli import _keep_freed_memory  # before torch is loaded, as the command does it

_keep_freed_memory()

import numpy as np
import pytest
import torch
from PIL import Image

import mlic
from mlic import refine
from mlic.config import CONFIGS, AttentionConfig, ModelConfig
from mlic.model import CompressionModel, build_model
from mlic.weights import seal

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# for the processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(mlic.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
SAMPLE = Path(mlic.__file__).parent / "samples" / "kodim23.png"


@pytest.fixture(autouse=True)
def one_pass_of_search(monkeypatch) -> None:
    """Where a test does not name an effort, and in its process only: the four of users would be most of the tests' time."""
    monkeypatch.setattr(refine, "EFFORT", 1)


@pytest.fixture(autouse=True, scope="session")
def search_of_any_machine():
    """Without bfloat16, which some have: in the tests' processes, not in those they start, its figures are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "has_bfloat16", lambda device: False)
        yield


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """(80, 96, 3) uint8: a piece of a photograph, 96 pixels wide and 80 high, with edges and texture."""
    with Image.open(SAMPLE) as image:
        return np.array(image.convert("RGB").crop((150, 100, 246, 180)))


@pytest.fixture(scope="session")
def small_models(photo) -> dict[str, CompressionModel]:
    """All models in miniature by name, sealed, with random weights; their latents vary and some of them need escapes."""
    return {name: _small_model(config, photo) for name, config in CONFIGS.items()}


def small_config(config: ModelConfig) -> ModelConfig:
    """A config of the same parts and the same number of slices, with few channels everywhere."""
    slices = (8,) * len(config.slices)
    return dataclasses.replace(
        config,
        width=16,
        slices=slices,
        z_channels=16,
        phi_h_channels=2 * sum(slices),
        channel_hidden=(16, 16),
        channel_out=config.channel_out and 16,
        intra=config.intra and _small_attention(config.intra, width=16, heads=2),
        inter=config.inter and _small_attention(config.inter, width=32, heads=1),
        parameters_hidden=(24,) * len(config.parameters_hidden),
        lrp_hidden=(16, 16),
        **({"coarse_width": 24, "depth": (1, 1), "quality_levels": 4} if config.transform == "patch" else {}),
    )


def _small_attention(config: AttentionConfig, *, width: int, heads: int) -> AttentionConfig:
    return dataclasses.replace(config, width=width, heads=heads, expansion=2)


@torch.no_grad()
def _small_model(config: ModelConfig, photo: np.ndarray) -> CompressionModel:
    torch.manual_seed(3)
    model = build_model(small_config(config))
    for parameter in model.parameters():
        if not parameter.any():  # what training starts from nothing, such as the LRP nets' last layers
            parameter.normal_(std=0.05)
    for nets in model.entropy_model.slices:  # scales that use many of the coding tables
        for net in (nets.parameters_anchor, nets.parameters_non_anchor):
            bias = net[-1].bias[: len(net[-1].bias) // 2]
            bias.uniform_(0.5, 4)
            if model.config.scale_form == "log":
                bias.log_()
    for net in [] if model.entropy_model.hyper is None else model.entropy_model.hyper.nets:
        net[-1].bias[: model.config.z_channels].fill_(math.log(3))  # as z is, below

    x = torch.from_numpy(photo[:64, :64]).permute(2, 0, 1)[None].float() / 255
    level = torch.full((1,), (model.config.quality_levels - 1) / 2) if model.config.variable_rate else None
    last = model.g_a[-1] if model.config.transform == "residual" else model.g_a.linear
    _scale_layer(last, 3 / model.analyse(x, level).std())
    y = model.analyse(x, level)
    _scale_layer(model.h_a[-1], 3 / model.h_a(y).std())
    model.h_a[-1].weight[0] *= 100  # beyond the prior's tables, at high rates
    return seal(model)


def _scale_layer(layer: torch.nn.Conv2d, factor: torch.Tensor) -> None:
    layer.weight *= factor
    layer.bias *= factor
