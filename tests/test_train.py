"""Training, at toy size: it learns, goes on where it was killed, runs on two processes, and says what does not fit."""

import copy
import csv
import dataclasses
import functools
import io
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import mlic
from mlic.branches import Branches
from mlic.cli import main
from mlic.config import CONFIGS, FAST, ModelConfig
from mlic.data import PictureBank, read_rgb
from mlic.errors import MlicError, ResultsError
from mlic.exact import REPLACEMENTS
from mlic.learning import begin_from
from mlic.model import build_model, lambda_level, level_lambda
from mlic.muon import Muon, matrix_weights, orthogonal
from mlic.tables import MAX_HALF_WIDTH, gaussian_tables
from mlic.train import train
from mlic.train_config import TrainConfig, crops_at, learning_rate
from mlic.train_log import RunLog, plot, read_log
from mlic.trainer import Trainer, _Forward, _Halves
from mlic.validation import symbol_counts, validate
from mlic.weights import load_model, save_weights, seal

KILLED = """
import os, signal, torch
save, calls = torch.save, []
def half(content, path):
    save(content, path)
    calls.append(path)
    if len(calls) == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""
SCRIPT = """
import os, sys, torch
from mlic.config import ModelConfig
from mlic.train import train
from mlic.train_config import TrainConfig
config, folder, out, steps = sys.argv[1:]
model = train(TrainConfig(model=ModelConfig.from_json(config), data=(folder,), out=out, steps=int(steps), batch=1,
    crop=64, bf16=False, save_every=0, threads=1, optimiser="adam"), resume=os.path.exists(f"{out}/checkpoint.pt"))
rank = os.environ.get("RANK", "")
torch.save({"average": model.state_dict(), "rng": torch.get_rng_state()}, f"{out}/final{rank}.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rows, columns = np.mgrid[:96, :80]
    for i in range(3):
        waves = 127 + 100 * np.sin(rows / (5 + i))[..., None] * np.cos(columns[..., None] / 9 + np.arange(3))
        Image.fromarray(waves.astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    Image.new("RGB", (20, 20)).save(folder / "tiny.png")
    return folder


@pytest.fixture(scope="module")
def config(small_models) -> ModelConfig:
    return dataclasses.replace(small_models["fast"].config, slices=(8, 8))  # more of them only take longer


def settings(folder, out, config="fast", **changes) -> TrainConfig:
    defaults = dict(model=config, data=(str(folder),), out=str(out), steps=6, batch=1, crop=64, log_every=2, bf16=False)
    defaults["optimiser"] = "adam"  # the quicker one at this size
    return TrainConfig(**{**defaults, **changes})


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("optimiser", "lr"), [("adam", 1e-3), ("muon", 4e-3)])
def test_loss_falls(folder, tmp_path, config, optimiser, lr):
    torch.manual_seed(0)
    bank = PictureBank([folder], smallest=64)

    def loss(model) -> float:
        (row,) = validate(model.eval(), bank, (2.0,), size=64)
        return row["bpp"] + float(level_lambda(config, torch.tensor(2.0))) * 255**2 * 10 ** (-row["psnr"] / 10)

    before = loss(build_model(config))
    changes = dict(steps=40, batch=2, log_every=10, lr=lr, optimiser=optimiser)
    after = loss(train(settings(folder, tmp_path, config, **changes)))
    assert after < 0.8 * before
    log = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [row["step"] for row in log] == ["10", "20", "30", "40"]
    assert float(log[-1]["loss"]) > 0 and float(log[-1]["skipped"]) == 0


def test_tables_follow_the_symbols_of_training(folder, tmp_path, config):
    """The table of the commonest row, from a trained model's own counts, costs less on other crops than the Gaussian."""
    model = train(settings(folder, tmp_path, config, steps=5, batch=2))
    counts = model.gaussian.counts
    assert counts.sum() == 4 * 16 * config.latent_channels * (64 // 16) ** 2
    other = symbol_counts(model, PictureBank([folder], smallest=64), crop=64)
    assert not np.array_equal(other, counts)
    row = counts.sum(1).argmax()

    def bits(tables) -> float:
        half = -tables.first[row]
        return other[row, MAX_HALF_WIDTH - half : MAX_HALF_WIDTH + half + 1] @ (24 - np.log2(tables.row(row)[:-1]))

    sealed = seal(model).tables.gaussian
    np.testing.assert_array_equal(sealed.frequencies, gaussian_tables(counts, dependent=True).frequencies)
    assert bits(sealed) < bits(gaussian_tables(dependent=True))


def test_killed_and_resumed_is_as_unbroken(folder, tmp_path, config):
    """Killed while it writes its fourth checkpoint."""
    changes = dict(steps=12, save_every=0, threads=1)
    whole = train(settings(folder, tmp_path / "whole", config, **changes))
    command = [sys.executable, "-c", KILLED + SCRIPT, config.to_json(), str(folder), str(tmp_path / "broken"), "12"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)["steps"] == 3
    broken = train(settings(folder, tmp_path / "broken", config, **changes), resume=True)
    assert same(whole.state_dict(), broken.state_dict())
    assert list(read_log(tmp_path / "broken" / "log.csv")["step"]) == [4, 6, 8, 10, 12]


def test_one_process_takes_over_from_another(folder, tmp_path, config):
    """The first would never end; nobody else may join it; the second finds all its steps."""
    command = [sys.executable, "-c", SCRIPT, config.to_json(), str(folder), str(tmp_path), str(10**6)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "checkpoint.pt").exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        with pytest.raises(ValueError, match="another process"):
            train(settings(folder, tmp_path, config), resume=True)
        assert first.poll() is None and not (tmp_path / "stop").exists()
        assert train(settings(folder, tmp_path, config, steps=1), take_over=True) is not None
        assert "no attribute 'state_dict'" in first.communicate(timeout=60)[1]  # stopped: `train` gave None
    finally:
        first.kill()
    steps = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["steps"]
    assert steps > 1 and not (tmp_path / "stop").exists()
    train(settings(folder, tmp_path, config, steps=steps + 2), resume=True)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["steps"] == steps + 2


@pytest.mark.parametrize("way", ["file", signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_can_go_on(folder, tmp_path, config, monkeypatch, way):
    (tmp_path / "stop").touch()  # left over: it means no run that begins later
    stepped, usual = Trainer.step, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def step(trainer, progress):
        stepped(trainer, progress)
        if trainer.steps == 3:
            (tmp_path / "stop").touch() if way == "file" else signal.raise_signal(way)

    monkeypatch.setattr(Trainer, "step", step)
    assert train(settings(folder, tmp_path, config)) is None
    assert usual == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["steps"] == 3
    assert train(settings(folder, tmp_path, config), resume=True) is not None
    assert list(read_log(tmp_path / "log.csv")["step"]) == [2, 4, 6]


def test_the_command_from_beginning_to_end(folder, tmp_path, config, monkeypatch):
    monkeypatch.setitem(CONFIGS, "fast", config)

    def run(out, *options, code=0):
        common = ["train", "--data", folder, "--out", tmp_path / out, "--crop", 64, "--batch", 1, "--optimiser", "adam"]
        said = CliRunner().invoke(main, [str(word) for word in (*common, *options)])
        assert said.exit_code == code, said.output
        return said.output

    def steps(out):
        return torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["steps"]

    assert "no run in" in run("a", "--steps", 1, "--resume", code=2)
    assert "weights" in run("a", "--steps", 2, "--lr", 3e-3, "--scale", 1, "--scale", 0.9)
    path = tmp_path / "a" / "fast.safetensors"
    model = load_model(path)
    picture = np.zeros((64, 64, 3), np.uint8)
    assert mlic.decode(mlic.encode(picture, model=path), path).size == (64, 64)
    with safe_open(path, "pt") as file:
        told = file.metadata()["training"]
    assert "lr=0.003" in told and "scales=(1.0, 0.9)" in told
    assert f"data=('{folder.name}',), out='a'" in told and str(tmp_path.parent) not in told
    assert "resume it (--resume)" in run("a", "--steps", 3, code=2)
    run("a", "--steps", 3, "--resume")
    assert steps("a") == 3 and load_model(path).digest != model.digest
    run("b", "--steps", 1, "--lr", 1e-9, "--init", path)
    begun = load_model(tmp_path / "b" / "fast.safetensors").g_a.head.weight
    assert torch.allclose(begun, load_model(path).g_a.head.weight, atol=1e-3)
    assert "weights" in run("c", "--steps", 1, "--take-over")  # nobody to take over from
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda trainer, progress: (tmp_path / "d" / "stop").touch())
        assert "--resume goes on" in run("d", "--steps", 5, code=130) and not (tmp_path / "d" / "fast.safetensors").exists()
    for option, value in (("--minutes", "inf"), ("--scale", "nan")):
        assert "finite" in run("c", option, value, code=2)
    save_weights(tmp_path / "own.safetensors", build_model(dataclasses.replace(config, name="mine", width=24)))
    assert "mine.safetensors" in run("e", "--steps", 1, "--model", tmp_path / "own.safetensors")
    assert load_model(tmp_path / "e" / "mine.safetensors").config.width == 24
    assert "no model called 'nope'" in run("f", "--steps", 1, "--model", "nope", code=2)


def test_layers_without_exact_form_are_known_before_they_are_trained(folder, tmp_path, config, monkeypatch, capfd):
    train(settings(folder, tmp_path / "a", config, steps=1))
    assert "exact" not in capfd.readouterr().err
    monkeypatch.delitem(REPLACEMENTS, torch.nn.LeakyReLU)
    train(settings(folder, tmp_path / "b", config, steps=1))
    assert "its files will need exact=False (--float): LeakyReLU has no exact form" in capfd.readouterr().err


def test_a_run_in_minutes(folder, tmp_path, config, monkeypatch):
    """Steps of ten seconds each, by the clock."""
    now = [0.0]
    monkeypatch.setattr("mlic.train.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Trainer, "step", lambda self, progress: seen.append(progress) or now.__setitem__(0, now[0] + 10))
    seen = []
    train(settings(folder, tmp_path, config, steps=None, minutes=1))
    assert seen == pytest.approx([i / 6 for i in range(6)])


def test_two_processes_share_the_work(folder, tmp_path, config):
    """Also where they go on with the run of one."""
    train(settings(folder, tmp_path / "out", config, steps=2))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [config.to_json(), str(folder), str(tmp_path / "out"), "4"]
    subprocess.run([*launch, *arguments], check=True, capture_output=True, timeout=120, env=environment)
    first, second = (torch.load(tmp_path / "out" / f"final{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first["average"], second["average"]), "the processes' weights must stay equal"
    assert not torch.equal(first["rng"], second["rng"]), "each must draw its own crops"
    assert [path.name for path in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint.pt"]
    assert list(read_log(tmp_path / "out" / "log.csv")["step"]) == [2, 4]


def test_muon_resumed_is_as_unbroken(folder, tmp_path, config):
    def steps(trainer, *numbers):
        for i in numbers:
            trainer.step(i / 4)
        return trainer

    def fresh():
        return Trainer(settings(folder, tmp_path, config, optimiser="muon"))

    whole = steps(fresh(), 0, 1, 2, 3)
    saved = io.BytesIO()
    torch.save(steps(fresh(), 0, 1).state(), saved)
    saved.seek(0)
    broken = fresh()
    broken.load(torch.load(saved, weights_only=True))
    steps(broken, 2, 3)
    assert same(whole.model.state_dict(), broken.model.state_dict())
    assert same(whole.average.state_dict(), broken.average.state_dict())


def test_a_checkpoint_gives_no_settings_of_another_device(folder, tmp_path, config):
    trainer = Trainer(settings(folder, tmp_path, config, optimiser="adam"))
    trainer.step(0.5)
    state = copy.deepcopy(trainer.state())
    for group in state["optimiser"]["param_groups"]:  # as a CUDA device has them
        group.update(lr=torch.tensor(5.0), capturable=True)
    trainer.load(state)
    assert all(type(g["lr"]) is float and not g["capturable"] for g in trainer.optimisers[0].param_groups)
    with pytest.raises(ValueError, match="not made with --optimiser muon"):
        Trainer(settings(folder, tmp_path, config, optimiser="muon")).load(state)


@pytest.mark.parametrize(("half", "accuracy"), [(False, 1e-3), (True, 0.05)])
def test_orthogonal(half, accuracy):
    torch.manual_seed(0)
    x = torch.randn(3, 8, 20)
    made = orthogonal(x, half=half)
    assert made.dtype == torch.float32 and half == torch.equal(made, made.bfloat16().float())
    u, s, vh = torch.linalg.svd(made, full_matrices=False)
    assert 0.6 < s.min() and s.max() < 1.3
    directions = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose((u @ vh), directions[0] @ directions[2], atol=accuracy)
    assert not orthogonal(torch.zeros(1, 4, 4), half=half).any()


def test_muon_takes_steps_of_one_size_and_leaves_out_what_is_no_matrix(config):
    torch.manual_seed(0)
    model = build_model(config)
    weights = matrix_weights(model)
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for p in weights}
    assert "g_a.fine.0.conv1.weight" in taken and "entropy_model.slices.1.lrp_anchor.0.weight" in taken
    assert all(n.endswith("weight") and not n.startswith(("g_a.linear", "g_s.linear", "gains", "prior")) for n in taken)
    assert all(p.shape[1] > 1 for p in weights), "no depthwise convolutions"
    before = [p.detach().clone() for p in weights]
    optimiser = Muon(weights, lr=0.01)
    for p in weights:
        p.grad = torch.randn_like(p) * 7
    optimiser.step()
    moved = [(a - b).square().mean().sqrt().item() for a, b in zip(before, weights)]
    assert all(0.0013 < size < 0.0025 for size in moved), "0.2 times the learning rate"
    alone = torch.nn.Parameter(before[0].clone())
    alone.grad = weights[0].grad
    Muon([alone], lr=0.01).step()
    assert torch.allclose(alone, weights[0], atol=1e-6), "batched as by itself"


def test_muon_takes_a_share_of_the_weights_away():
    start = [torch.randn(8, 4, 3, 3), torch.randn(6, 16)]
    ends = []
    for decay, bad in ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0)):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimiser = Muon(weights, lr=0.1, weight_decay=decay)
        optimiser.found_inf.fill_(bad)
        for w, of in zip(weights, start):
            w.grad = of.flip(0)
        optimiser.step()
        ends.append([w.detach() for w in weights])
    for before, plain, decayed, skipped in zip(start, *ends):
        assert torch.allclose(decayed, plain - 0.05 * before, atol=1e-6) and torch.equal(skipped, before)


def test_a_step_reads_nothing_from_the_device(folder, tmp_path, config):
    """Fake tensors have no values: whatever would wait for one, as no CUDA graph allows, raises."""
    trainer = Trainer(settings(folder, tmp_path, config, optimiser="muon", muon_decay=0.1))
    trainer.step(0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer._update(1, 64)
        with pytest.raises(DataDependentOutputException):
            trainer.measures.sum().item()


def plain(model):
    """Without tables, as a model in training is: its symbols are plain ones."""
    model = copy.deepcopy(model)
    model.gaussian.lattice_bits = None
    return model


def begun(config, given):
    model = build_model(config)
    begin_from(model, given)
    return model


def test_levels_begin_where_their_lambda_was(small_models):
    given = copy.deepcopy(small_models["fast"])
    levels, channels = given.gains.encoder_latent.rows.shape
    slope = torch.arange(levels)[:, None] * torch.linspace(1, 2, channels)  # a line over log lambda, steeper or not
    given.gains.encoder_latent.rows.copy_(slope)
    assert same(begun(given.config, given).state_dict(), given.state_dict())

    low, high = given.config.lambda_range
    shape = dataclasses.replace(given.config, lambda_range=(low / 3, high * 2))
    model = begun(shape, given)
    rows = model.gains.encoder_latent.rows
    was = (level_lambda(shape, torch.arange(levels)) / low).log() / np.log(high / low) * (levels - 1)
    assert was[0] < 0 and was[-1] > levels - 1, "some are beyond what the given weights know"
    assert torch.allclose(rows, was[:, None] * torch.linspace(1, 2, channels), atol=1e-4)
    assert torch.equal(model.g_a.head.weight, given.g_a.head.weight)


@pytest.mark.parametrize("left_out", [("inter",), ("intra",), ("intra", "inter")])
@torch.no_grad()
def test_contexts_that_say_nothing_can_be_left_out(small_models, left_out):
    torch.manual_seed(0)
    contexts = {name: getattr(small_models["mlic++"].config, name) for name in ("intra", "inter")}
    given = build_model(dataclasses.replace(small_models["fast"].config, **contexts)).eval()
    x, level = torch.rand(2, 3, 128, 64), torch.tensor([0.0, 3.0])
    silent = [nets for nets in given.entropy_model.slices if nets.inter is not None]
    for nets in silent:
        for net in (nets.inter.skip, nets.inter.mlp[-1], nets.intra.reprojection, nets.intra.mlp[-1]):
            net.weight.zero_()
            net.bias.zero_()
    model = begun(dataclasses.replace(given.config, **dict.fromkeys(left_out)), given).eval()
    (before, a), (after, b) = given(x, level, noisy=False), model(x, level, noisy=False)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(b.y_bits, a.y_bits)
    assert silent and len(model.state_dict()) < len(given.state_dict())
    with pytest.raises(ValueError, match="another shape"):
        begun(given.config, model)


@pytest.mark.parametrize("part", ["step_hidden", "hyper_hidden", "shifted"])
@torch.no_grad()
def test_steps_and_contexts_of_z_begin_with_nothing_to_add(small_models, part):
    """But z has other densities than the prior's at once, around the same medians; values of plain symbols have no shifts."""
    torch.manual_seed(0)
    given = build_model(dataclasses.replace(small_models["fast"].config, **{part: False if part == "shifted" else 0})).eval()
    model = begun(small_models["fast"].config, given).eval()
    x, level = torch.rand(2, 3, 192, 64), torch.tensor([0.0, 3.0])
    (before, a), (after, b) = given(x, level, noisy=False), model(x, level, noisy=False)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(b.y_bits, a.y_bits)
    assert torch.allclose(b.z_bits, a.z_bits) == (part != "hyper_hidden") and b.z_bits.isfinite().all()
    with pytest.raises(ValueError, match="another shape"):
        begun(given.config, model)


@torch.no_grad()
def test_new_blocks_begin_with_nothing_to_add(small_models):
    given = plain(small_models["fast"])
    model = begun(dataclasses.replace(given.config, depth=(3, 2)), given).eval()
    x, level = torch.rand(2, 3, 128, 64), torch.tensor([0.0, 3.0])
    (before, a), (after, b) = given(x, level, noisy=False), model(x, level, noisy=False)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(b.y_bits, a.y_bits)
    assert model.g_s.fine[2].conv1.weight.any(), "but they learn"
    with pytest.raises(ValueError, match="another shape"):
        begun(given.config, model)


@torch.no_grad()
def test_new_slices_begin_as_nothing(small_models):
    """What was there before says and shows the same; a new slice of zeros costs little."""
    given = plain(small_models["fast"])
    old = given.config.latent_channels
    model = begun(dataclasses.replace(given.config, slices=(*given.config.slices, 16)), given).eval()
    model.g_a.linear.weight[old:] = 0
    x, level = torch.rand(2, 3, 128, 64), torch.tensor([0.0, 3.0])
    (before, a), (after, b) = given(x, level, noisy=False), model(x, level, noisy=False)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(b.z_bits, a.z_bits)
    torch.testing.assert_close(torch.stack(b.slice_bits[:-1]), torch.stack(a.slice_bits))
    assert (b.slice_bits[-1] < 0.1 * 16 * 8 * 4).all()
    assert torch.equal(model.gains.encoder_latent.rows[:, :old], given.gains.encoder_latent.rows)


def test_slices_are_added_at_the_end_only(small_models):
    given = small_models["fast"]
    for slices in (given.config.slices[:-1], (16, *given.config.slices)):
        with pytest.raises(ValueError, match="another shape"):
            begun(dataclasses.replace(given.config, slices=slices), given)
    given = small_models["mlic"]
    with pytest.raises(ValueError, match="another shape"):  # its transforms would not begin as they were
        begun(dataclasses.replace(given.config, slices=(*given.config.slices, 16)), given)


def test_every_step_sees_the_whole_range_of_levels(folder, tmp_path, config, monkeypatch):
    seen = []
    monkeypatch.setattr("mlic.trainer.level_lambda", lambda config, level: seen.append(level) or level_lambda(config, level))
    trainer = Trainer(settings(folder, tmp_path, config, batch=3, papers_share=0.0))
    for _ in range(4):
        trainer.step(0.5)
    last = config.quality_levels - 1
    assert all(i / 3 * last <= level[i] <= (i + 1) / 3 * last for level in seen for i in range(3))
    assert len({round(float(level[0]), 6) for level in seen}) == 4


def test_a_share_of_each_step_is_in_the_papers_range_of_rates(folder, tmp_path, config):
    trainer = Trainer(settings(folder, tmp_path, config, papers_share=0.75))
    low, high = (lambda_level(config, lmbda) for lmbda in (0.0018, 0.0483))
    assert level_lambda(config, torch.tensor([low, high])).tolist() == pytest.approx([0.0018, 0.0483])
    levels = torch.stack([trainer._levels(8) for _ in range(50)])
    of_papers, others = levels[:, :6], levels[:, 6:]
    for share, (first, last) in ((of_papers, (low, high)), (others, (0, config.quality_levels - 1))):
        parts = torch.linspace(first, last, share.shape[1] + 1)
        assert (share >= parts[:-1] - 1e-5).all() and (share <= parts[1:] + 1e-5).all()
        assert (share.std(0) > 0.2 * (parts[1] - parts[0])).all()


def test_rates_all_beyond_those_of_the_papers(folder, tmp_path, config):
    config = dataclasses.replace(config, lambda_range=(0.1, 1.0))
    assert lambda_level(config, 0.0483) == 0 and lambda_level(config, 2.0) == config.quality_levels - 1
    levels = torch.stack([Trainer(settings(folder, tmp_path, config, papers_share=0.5))._levels(4) for _ in range(3)])
    assert (levels.max(1).values > 0.75 * (config.quality_levels - 1)).all()


def test_weights_of_another_shape_are_not_begun_from(small_models):
    shape = dataclasses.replace(small_models["fast"].config, width=24)
    with pytest.raises(ValueError, match="another shape"):
        begun(shape, small_models["fast"])


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(folder, tmp_path, config, optimiser):
    trainer = Trainer(settings(folder, tmp_path, config, optimiser=optimiser))
    trainer.step(0.5)
    seen = trainer.read_measures()
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.bank.crops, crops = lambda *size: torch.full((1, 3, 64, 64), float("nan")), trainer.bank.crops
    trainer.step(0.5)
    assert same(before, trainer.model.state_dict())
    none = trainer.read_measures()
    assert none.pop("skipped") == 1 and all(map(math.isnan, none.values())), "no step, no means"
    trainer.step(0.5)
    moments = [v for o in trainer.optimisers for state in o.state.values() for v in state.values()]
    assert all(torch.isfinite(v).all() for v in moments)
    trainer.bank.crops = crops
    trainer.step(0.5)
    assert not same(before, trainer.model.state_dict())
    both = trainer.read_measures()
    assert both["skipped"] == 1 and 0.5 * seen["loss"] < both["loss"] < 1.5 * seen["loss"], "the mean of the one that was made"


def test_a_full_disk_does_not_stop_training(folder, tmp_path, config, monkeypatch, capfd):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("mlic.train_log._append", full)
    train(settings(folder, tmp_path, config, steps=2, val=(str(folder),)))
    said = capfd.readouterr().err
    for what in ("log", "validation", "checkpoint"):
        assert f"{what} not written: No space left on device; training goes on" in said
    assert not list(tmp_path.iterdir())


def test_the_log_goes_on_where_the_run_does(folder, tmp_path, config):
    """Steps after the checkpoint are made, and told, once more; so is what was not written to its end."""
    train(settings(folder, tmp_path, config, steps=4))
    log = tmp_path / "log.csv"
    whole = log.read_bytes()
    log.write_bytes(whole + whole.splitlines(keepends=True)[-1].replace(b"4,", b"6,", 1) + b"8,0.")
    train(settings(folder, tmp_path, config, steps=7), resume=True)
    assert list(read_log(log)["step"]) == [2, 4, 6, 7] and log.read_bytes().startswith(whole)
    before = log.read_bytes()
    with pytest.raises(ValueError, match="not made with this model"):
        train(settings(folder, tmp_path, dataclasses.replace(config, width=24), steps=9), resume=True)
    assert log.read_bytes() == before
    (tmp_path / "checkpoint.pt").unlink()
    train(settings(folder, tmp_path, config, steps=1))
    assert list(read_log(log)["step"]) == [1]


def test_lines_are_in_the_log_whole_or_not_at_all(tmp_path, monkeypatch):
    log, written = RunLog(tmp_path), csv.DictWriter.writerows

    def half(writer, rows):
        written(writer, rows)
        raise OSError("No space left on device")

    for step in (1, 2, 3, 4):  # the first line of all, and a later one, do not fit
        monkeypatch.setattr(csv.DictWriter, "writerows", half if step in (1, 3) else written)
        try:
            log.line({"step": step, "loss": 0.5})
        except OSError:
            assert step in (1, 3)
    assert list(read_log(tmp_path / "log.csv")["step"]) == [2, 4]
    (tmp_path / "log.csv").write_bytes(b"step,lo")
    log = RunLog(tmp_path, step=4)
    log.line({"step": 5, "loss": 0.5})
    assert list(read_log(tmp_path / "log.csv")["step"]) == [5]


def test_a_run_resumed_from_before_its_validations_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    log = RunLog(tmp_path)
    for step in (50, 100):
        log.line({"step": step, "seconds": step / 10, "loss": 0.5, "bpp": 0.3, "mse": 1e-3, "learning_rate": 1e-3})
    log.validation([{"level": 0, "bpp": 0.1, "psnr": 30}], np.zeros((8, 8, 3), np.uint8), step=100, seconds=10)
    RunLog(tmp_path, step=50)
    assert plot(tmp_path) == tmp_path / "run.png"


def test_a_checkpoint_that_is_none_or_another_model_s(folder, tmp_path, config):
    with pytest.raises(ValueError, match="no run in .* to go on with"):
        train(settings(folder, tmp_path, config, steps=1), resume=True)
    train(settings(folder, tmp_path, config, steps=1))
    with pytest.raises(ValueError, match="there is a run in"):
        train(settings(folder, tmp_path, config, steps=2))
    for change in ({"width": 24}, {"lambda_range": (0.001, 0.1)}):  # the latter of the same tensors
        with pytest.raises(ValueError, match="not made with this model"):
            train(settings(folder, tmp_path, dataclasses.replace(config, **change), steps=2), resume=True)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    other = io.BytesIO()
    torch.save({"a": 1}, other)
    for damaged in (whole[: len(whole) // 2], b"nothing of the kind", b"hello world, a text\n", b"", other.getvalue()):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged, or no checkpoint"):
            train(settings(folder, tmp_path, config, steps=2), resume=True)


def test_pictures_to_measure_on_are_looked_for_first(folder, tmp_path, config):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        train(settings(folder, tmp_path / "out", config, val=(str(tmp_path / "empty"),)))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_single_rate_models(folder, tmp_path, small_models, metric):
    big = tmp_path / "big"
    big.mkdir()
    Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(big / "a.png")
    changes = dict(lmbda=0.01 if metric == "mse" else 8.0, metric=metric, crop=192, steps=2)
    model = train(settings(big, tmp_path / "out", small_models["mlic"].config, **changes))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_unreadable_and_small_pictures_are_left_out_with_a_word(folder, capfd):
    assert len(PictureBank([folder], smallest=64)) == 3
    said = capfd.readouterr().err
    assert "broken.png" in said and "tiny.png" in said


def test_pictures_of_all_kinds_are_read_as_the_encoder_reads_them(tmp_path, capfd):
    """And what Pillow raises on damaged files, which may be anything, is a word."""
    ramp = np.linspace(0, 65535, 96 * 80).reshape(80, 96)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([ramp // 257, ramp * 0]).astype(np.uint8), "LA").save(tmp_path / "hidden.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    coded = io.BytesIO()
    Image.fromarray((ramp // 257).astype(np.uint8)).convert("RGB").save(coded, "AVIF", quality=60)
    for i, at in enumerate(range(0, len(coded.getvalue()), 40)):
        (tmp_path / f"damaged{i}.avif").write_bytes(coded.getvalue()[:at] + bytes(8) + coded.getvalue()[at + 8 :])
    bank = PictureBank([tmp_path], smallest=64)
    sizes = {name: read_rgb(tmp_path / name) for name in ("deep.png", "float.tif")}
    assert all(np.abs(pixels[..., 1] - ramp / 257).max() <= 1 for pixels in sizes.values())
    assert len(np.unique(read_rgb(tmp_path / "hidden.png"))) == 1, "nothing that shows"
    assert len(bank) >= 3 and "left out" in capfd.readouterr().err


def test_crops_are_pieces_of_the_pictures(tmp_path):
    coded = np.arange(70 * 90).reshape(70, 90)
    picture = np.stack([coded // 256, coded % 256, np.full_like(coded, 7)], 2).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture[::-1].copy()).save(tmp_path / "b.png")
    bank = PictureBank([tmp_path], smallest=64)
    assert np.array_equal(bank.picture(0).permute(1, 2, 0).numpy(), picture)
    for crop in (bank.crops(32, 64) * 255).round().long():
        place = crop[0] * 256 + crop[1]
        rows, columns = place // 90, place % 90
        steps = {(int(rows[a, b] - rows[0, 0]), int(columns[a, b] - columns[0, 0])) for a, b in ((63, 0), (0, 63))}
        assert {tuple(map(abs, step)) for step in steps} == {(63, 0), (0, 63)}
        assert (crop[2] == 7).all()


def test_pictures_are_there_at_all_scales_that_crops_fit_into(tmp_path):
    Image.new("RGB", (160, 128), (40, 80, 120)).save(tmp_path / "a.png")
    bank = PictureBank([tmp_path], smallest=64, scales=(0.25, 0.5, 1.0))
    assert [tuple(bank.picture(i).shape[1:]) for i in range(len(bank))] == [(128, 160), (64, 80)]
    assert (bank.count(64), bank.count(128)) == (2, 1)
    assert torch.equal(bank.crops(8, 128)[:, :, 0, 0], torch.tensor([40, 80, 120]).expand(8, 3) / 255)
    with pytest.raises(ValueError, match="no picture for crops of 192 pixels: the largest has 128"):
        bank.crops(1, 192)


def test_halved_weights_and_their_gradients(config):
    model = build_model(config)
    halved = _Forward(model, half=True).halved
    assert "g_a.head.weight" in halved and "entropy_model.slices.0.local.0.bias" in halved
    assert not [name for name in halved if name.startswith(("g_a.linear", "g_s.linear", "gains", "prior"))]
    weights = [torch.randn(3, 2, 1, 1, requires_grad=True), torch.randn(5, requires_grad=True)]
    halves = _Halves.apply(Branches(), *weights)
    assert all(torch.equal(half, w.bfloat16()) for half, w in zip(halves, weights))
    sum(((i + 2) * half).sum() for i, half in enumerate(halves)).backward()
    for i, w in enumerate(weights):
        assert w.grad.dtype == torch.float32 and (w.grad == i + 2).all()


@pytest.mark.parametrize("units", [False, True])
def test_bfloat16_by_itself_only_where_it_is_fast(folder, tmp_path, config, monkeypatch, units):
    monkeypatch.setattr(mlic.trainer, "has_bfloat16", lambda device: units)
    default = Trainer(settings(folder, tmp_path, config, bf16=None))
    asked = Trainer(settings(folder, tmp_path, config, bf16=not units), bank=default.bank)
    assert ("g_a.head.weight" in default.forward.halved) == units
    assert ("g_a.head.weight" in asked.forward.halved) == (not units)


@pytest.mark.parametrize(("what", "graphs"), [("formulas", range(2, 9)), ("all", range(1, 2))])
def test_compiled(folder, tmp_path, config, monkeypatch, what, graphs):
    """What is compiled becomes few graphs, the whole step one, and gives what the step does by itself. What turns graphs
    into kernels is left out: for CPUs, that takes longer than all other tests.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def measures(compiled: str | None) -> dict[str, float]:
        trainer = Trainer(settings(folder, tmp_path, config, bf16=True, compiled=compiled))
        trainer.prepare()
        prepared = counters["stats"]["unique_graphs"]
        trainer.step(0.5)
        trainer.step(0.5)
        assert compiled != "all" or counters["stats"]["unique_graphs"] == prepared > before
        return trainer.read_measures()

    before = counters["stats"]["unique_graphs"]
    plain, compiled = measures(None), measures(what)
    assert counters["stats"]["unique_graphs"] - before in graphs and not counters["graph_break"]
    assert compiled["skipped"] == 0 and compiled.keys() == plain.keys()
    assert all(compiled[name] == pytest.approx(plain[name], rel=0.01) for name in ("loss", "bpp", "mse", "gradient_norm"))


def test_neither_the_coder_nor_the_format_is_needed():
    program = "import sys, mlic.train, mlic.cli_train; print([m for m in sys.modules if m in sys.argv[1:]])"
    command = [sys.executable, "-c", program, "constriction", "mlic.coder", "mlic.container", "mlic.codec"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        PictureBank([tmp_path], smallest=64)


def test_schedule():
    config = settings("", "", warmup=0.1, decay=0.4, lr=1.0, lr_end=0.1)
    assert learning_rate(config, 0) < 0.05 and learning_rate(config, 0.5) == 1.0
    assert learning_rate(config, 0.8) == pytest.approx(0.55) and learning_rate(config, 1.0) == pytest.approx(0.1)
    config = dataclasses.replace(config, lr=0.05)
    assert learning_rate(config, 0.8) == learning_rate(config, 1.0) == 0.05, "it never rises"


def test_larger_crops_at_the_end(folder, tmp_path, config):
    fits = settings("", "", batch=8, crop=128, last_crop=256, last_share=0.25)
    assert crops_at(fits, 0.7) == (8, 128) and crops_at(fits, 0.75) == (2, 256)
    assert crops_at(settings("", "", batch=1, last_crop=256), 0.99) == (1, 256)
    big = tmp_path / "big"
    big.mkdir()
    Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(big / "a.png")
    trainer = Trainer(settings(big, tmp_path, config, batch=4, last_crop=128))
    sizes, crops = [], trainer.bank.crops
    trainer.bank.crops = lambda *size: sizes.append(size) or crops(*size)
    trainer.step(0.0)
    trainer.step(0.99)
    assert sizes == [(4, 64), (1, 128)]


def test_logs_pictures_and_plot(folder, tmp_path, config):
    pytest.importorskip("matplotlib")
    changes = dict(val=(str(folder),), val_every=1e-9, steps=2)
    train(settings(folder, tmp_path, config, **changes))
    rows = read_log(tmp_path / "validation.csv")
    assert list(rows["step"]) == [1] * 7 + [2] * 7 and len(set(rows["level"])) == 7
    last = config.quality_levels - 1
    assert (rows["level"].min(), rows["level"].max()) == (0, last) and (rows["bpp"] > 0).all()
    with Image.open(tmp_path / "validation-0000002.png") as shown:
        assert shown.size == (4 * 256, 3 * 256), "original and three levels, of three pictures"
        original = np.array(shown)[:64, :64]
    picture = PictureBank([folder], smallest=64).picture(0).permute(1, 2, 0).numpy()
    assert np.array_equal(original, picture[16:80, 8:72])
    said = CliRunner().invoke(main, ["train-plot", str(tmp_path)])
    assert said.exit_code == 0 and said.output.strip() == str(tmp_path / "run.png")
    with Image.open(tmp_path / "run.png") as drawn:
        assert drawn.size == (1100, 700) and len(drawn.convert("L").getcolors()) > 20


def test_no_log_to_plot(tmp_path):
    with pytest.raises(ResultsError, match="No such file"):
        plot(tmp_path)
    (tmp_path / "log.csv").write_text("step,loss\n1,many\n")
    with pytest.raises(ResultsError, match="not a log"):
        plot(tmp_path)


def test_tensorboard(folder, tmp_path, config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(settings(folder, tmp_path, config, tensorboard=True, val=(str(folder),)))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    assert [e.step for e in events.Scalars("validation level 0/psnr")] == [6] and events.Tags()["images"]


def test_tensorboard_is_missing(folder, tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MlicError, match="pip install 'mlic\\[train\\]'"):
        train(settings(folder, tmp_path, config, tensorboard=True))


def test_lambda_is_log_spaced():
    low, middle, high = level_lambda(FAST, torch.tensor([0.0, 31.5, 63.0])).tolist()
    assert (low, high) == pytest.approx(FAST.lambda_range) and middle == pytest.approx((low * high) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"minutes": 1}, "either steps or minutes"),
        ({"steps": None}, "either steps or minutes"),
        ({"crop": 100}, "multiple of 64"),
        ({"last_crop": 100}, "multiple of 64"),
        ({"metric": "vmaf"}, "metric"),
        ({"optimiser": "sgd"}, "optimiser"),
        ({"val_every": 5}, "pictures to measure on"),
        ({"metric": "ms-ssim"}, "192"),
        ({"lmbda": 0.01}, "takes no lambda"),
        ({"metric": "ms-ssim", "crop": 192}, "trained for MSE"),
    ],
)
def test_settings_that_do_not_fit(folder, tmp_path, config, changes, why):
    with pytest.raises(ValueError, match=why):
        train(settings(folder, tmp_path, config, **changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("optimiser", "branches", "compiled"), [("adam", 0, None), ("muon", 0, None), ("muon", 3, None), ("adam", 0, "formulas")]
)
def test_graph_capture_on_cuda(tmp_path, config, optimiser, branches, compiled):
    Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "a.png")

    def trainer():
        changes = dict(bf16=True, optimiser=optimiser, branches=branches, compiled=compiled, batch=4)
        changes |= dict(last_crop=128, last_share=0.25)
        return Trainer(settings(tmp_path, tmp_path, config, **changes), device="cuda")

    def run(trainer, *, begin, end):
        for i in range(begin, end):
            trainer.step(i / 24)
        return trainer.read_measures()

    first = trainer()
    assert run(first, begin=0, end=12)["skipped"] == 0 and first.graph is not None
    resumed = trainer()
    resumed.load(copy.deepcopy(first.state()))
    before = {name: p.clone() for name, p in resumed.model.state_dict().items()}
    seen = run(resumed, begin=12, end=24)  # from 18 on with larger crops, from 21 on with a graph of their own
    assert resumed.graph is not None and resumed.graph_size == (1, 128)
    assert seen["skipped"] == 0 and not same(before, resumed.model.state_dict())
    assert all(torch.isfinite(p).all() for p in resumed.model.parameters())
    resumed.bank.pixels.fill_(128)  # a graph reads what is there now ...
    assert run(resumed, begin=23, end=24)["mse"] < seen["mse"] / 2
    before = {name: p.clone() for name, p in resumed.model.state_dict().items()}
    for group in (group for o in resumed.optimisers for group in o.param_groups):
        group["relative"] = 0.0  # ... and this learning rate
    run(resumed, begin=23, end=24)
    assert same(before, resumed.model.state_dict())
