"""Where training begins and how fast each weight learns."""

import pytest
import torch
from PIL import Image

from mlic.data import PictureBank
from mlic.learning import relative_rate, start
from mlic.model import build_model
from mlic.train_config import TrainConfig
from mlic.trainer import Trainer


@pytest.fixture
def bank(tmp_path) -> PictureBank:
    Image.effect_mandelbrot((192, 192), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "a.png")
    return PictureBank([tmp_path], smallest=64)


def test_rate_falls_with_the_inputs_of_a_sum():
    wide, narrow = torch.empty(8, 128, 3, 3), torch.empty(8, 16, 3, 3)
    assert relative_rate("g_a.head.weight", wide) == 192 / (128 * 9)
    assert relative_rate("g_a.head.weight", narrow) == 1
    assert relative_rate("prior.median", narrow[0, 0, 0]) == 8
    assert relative_rate("g_s.linear.weight", torch.empty(768, 320, 1, 1)) == 1
    assert relative_rate("entropy_model.slices.0.local.0.weight", wide, matrix=True) == 1
    assert relative_rate("g_a.head.bias", torch.empty(128)) == 1


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_every_parameter_learns_once_at_its_rate(small_models, bank, optimiser):
    config = TrainConfig(model=small_models["fast"].config, data=(), out="", steps=1, crop=64, optimiser=optimiser)
    trainer = Trainer(config, bank=bank)
    groups = [group for opt in trainer.optimisers for group in opt.param_groups]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainer.model.parameters())
    trainer.step(0.5)
    for group in trainer.optimisers[0].param_groups:
        assert group["lr"] == pytest.approx(config.lr * group["relative"])


def test_signals_keep_their_size_at_the_start(small_models):
    model = build_model(small_models["fast"].config)
    torch.manual_seed(0)
    start(model)
    y = torch.randn(4, model.config.latent_channels, 16, 16)
    x = y
    for layer in list(model.h_a)[:-1]:
        x = layer(x)
        if isinstance(layer, torch.nn.LeakyReLU):
            assert 0.3 < x.square().mean().sqrt() < 3
    for nets in model.entropy_model.slices:
        assert not nets.lrp_anchor[-1].weight.any(), "LRP begins as plain rounding"
