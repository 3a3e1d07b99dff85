"""Where training begins and how fast each weight learns."""

import copy

import pytest
import torch
from PIL import Image

from mlic.data import PictureBank
from mlic.learning import SILENT, recycle, relative_rate, shares_awake, start
from mlic.model import build_model
from mlic.train import TrainConfig, Trainer
from mlic.validation import silent_units


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
        if isinstance(layer, torch.nn.ReLU):
            assert 0.3 < x.square().mean().sqrt() < 3
    for nets in model.entropy_model.slices:
        assert not nets.lrp_anchor[-1].weight.any(), "LRP begins as plain rounding"


def test_silent_units_are_found(small_models, bank):
    model = copy.deepcopy(small_models["fast"]).eval()
    before = silent_units(model, bank)
    assert before["g_s"] < 0.5 and before.keys() == {"g_a", "h_a", "h_s", "entropy_model", "g_s"}
    with torch.no_grad():
        model.g_s.fine[0].conv1.bias.fill_(-100.0)
    units = [m.conv1.out_channels for m in model.g_s.modules() if hasattr(m, "conv1")]
    after = silent_units(model, bank)
    assert after["g_s"] - before["g_s"] > 0.5 * model.g_s.fine[0].conv1.out_channels / sum(units)
    assert after["g_a"] == before["g_a"]


def test_silent_units_begin_anew(small_models, bank):
    """Convolutions, sub-pixel ones and residual blocks: what is computed stays, what is silent can learn again."""
    model = copy.deepcopy(small_models["fast"])
    x, level = bank.crops(2, 64), torch.tensor([0.0, 2.0])
    units = {
        "h_s.3": ("h_s.2.0", "h_s.4", slice(4, 8)),  # one unit after the pixel shuffle, the second
        "g_a.fine.0.act": ("g_a.fine.0.conv1", "g_a.fine.0.conv2", slice(3, 4)),
        "entropy_model.slices.2.lrp_anchor.1": (
            "entropy_model.slices.2.lrp_anchor.0",
            "entropy_model.slices.2.lrp_anchor.2",
            slice(5, 6),
        ),
    }
    with torch.no_grad():
        for before, _, rows in units.values():
            model.get_parameter(f"{before}.bias")[rows] = -1e4
            model.get_parameter(f"{before}.weight")[rows] = 0
    average = copy.deepcopy(model)

    def run(at):
        return at(x, level, noisy=False)[0]

    shares = shares_awake(model, lambda: run(model))
    silent = {act: (share < SILENT).nonzero().flatten().tolist() for act, share in shares.items()}
    assert 1 in silent["h_s.3"] and 3 in silent["g_a.fine.0.act"]
    was = run(model)
    moments = {name: [torch.ones_like(p)] for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    assert recycle((model, average), shares, moments, generator) >= len(units)
    torch.testing.assert_close(run(model), was, rtol=1e-4, atol=1e-4)
    for _ in range(3):  # a draw may be silent too: in training, the next one comes 250 steps later
        shares = shares_awake(model, lambda: run(model))
        recycle((model, average), shares, {}, generator)
    torch.testing.assert_close(run(model), was, rtol=1e-4, atol=1e-4)
    again = shares_awake(model, lambda: run(model))
    for act, (before, after, rows) in units.items():
        unit = rows.start // (rows.stop - rows.start)
        for at in (model, average):
            assert at.get_parameter(f"{before}.weight")[rows].any()
            assert not at.get_parameter(f"{before}.bias")[rows].any()
        assert not moments[f"{before}.weight"][0][rows].any() and not moments[f"{after}.weight"][0][:, unit].any()
        assert moments[f"{after}.weight"][0].any(), "other units keep their moments"
        assert again[act][unit] > SILENT, act
    assert not moments["h_s.2.0.bias"][0][4:8].any()


def test_units_that_work_are_left_alone(small_models, bank):
    model = copy.deepcopy(small_models["fast"])
    shares = shares_awake(model, lambda: model(bank.crops(1, 64), torch.zeros(1)))
    assert recycle((model,), {n: torch.full_like(s, 0.5) for n, s in shares.items()}, {}, torch.Generator()) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_models["fast"].parameters()))
