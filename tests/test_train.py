"""Training, at toy size: it learns, goes on from where it was killed, runs on two processes, and says what does not fit."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mlic.config import FAST, ModelConfig
from mlic.data import PictureBank
from mlic.model import build_model
from mlic.train import TrainConfig, Trainer, learning_rate, level_lambda, train, validate

SCRIPT = """
import sys, torch
from mlic.config import ModelConfig
from mlic.train import TrainConfig, train
config, folder, out, steps = sys.argv[1:]
model = train(TrainConfig(model=ModelConfig.from_json(config), data=(folder,), out=out, steps=int(steps), batch=1,
    crop=64, bf16=False, save_every=0, threads=1))
torch.save(model.state_dict(), out + "/final.pt")
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
    return small_models["fast"].config


def settings(folder, out, config="fast", **changes) -> TrainConfig:
    defaults = dict(model=config, data=(str(folder),), out=str(out), steps=6, batch=1, crop=64, log_every=2, bf16=False)
    return TrainConfig(**{**defaults, **changes})


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_loss_falls(folder, tmp_path, config):
    torch.manual_seed(0)
    bank = PictureBank([folder], smallest=64)

    def loss(model) -> float:
        (row,) = validate(model.eval(), bank, (2.0,), size=64)
        return row["bpp"] + float(level_lambda(config, torch.tensor(2.0))) * 255**2 * 10 ** (-row["psnr"] / 10)

    before = loss(build_model(config))
    after = loss(train(settings(folder, tmp_path, config, steps=80, batch=2, log_every=20, lr=1e-3)))
    assert after < 0.8 * before
    log = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [row["step"] for row in log] == ["20", "40", "60", "80"]
    assert float(log[-1]["loss"]) > 0 and float(log[-1]["skipped"]) == 0


def test_killed_and_resumed_is_as_unbroken(folder, tmp_path, config):
    def command(out):
        return [sys.executable, "-c", SCRIPT, config.to_json(), str(folder), str(tmp_path / out), "20"]

    subprocess.run(command("whole"), check=True, capture_output=True)
    running = subprocess.Popen(command("broken"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "broken" / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "broken" / "final.pt").exists(), "killed too late to show anything"
    assert 0 < torch.load(checkpoint, weights_only=True)["steps"] < 20
    subprocess.run(command("broken"), check=True, capture_output=True)
    whole, broken = (torch.load(tmp_path / out / "final.pt", weights_only=True) for out in ("whole", "broken"))
    assert same(whole, broken)


def test_two_processes_share_the_work(folder, tmp_path, config):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [config.to_json(), str(folder), str(tmp_path / "out"), "3"]
    subprocess.run([*launch, *arguments], check=True, capture_output=True, timeout=120, env=environment)
    first, second = (torch.load(tmp_path / "out" / name, weights_only=True) for name in ("checkpoint.pt", "checkpoint-1.pt"))
    assert same(first["model"], second["model"]), "the processes' weights must stay equal"
    assert not torch.equal(first["rng"], second["rng"]), "each must draw its own crops"


def test_a_step_that_is_not_finite_is_skipped_and_counted(folder, tmp_path, config):
    trainer = Trainer(settings(folder, tmp_path, config))
    trainer.step(0.5)
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.bank.crops, crops = lambda *size: torch.full((1, 3, 64, 64), float("nan")), trainer.bank.crops
    trainer.step(0.5)
    assert same(before, trainer.model.state_dict())
    assert trainer.read_measures(2)["skipped"] == 1
    trainer.bank.crops = crops
    trainer.step(0.5)
    assert not same(before, trainer.model.state_dict())


def test_a_full_disk_does_not_stop_training(folder, tmp_path, config, monkeypatch, capfd):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    train(settings(folder, tmp_path, config, steps=2))
    assert "No space left on device; training goes on" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("*.tmp"))


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


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        PictureBank([tmp_path], smallest=64)


def test_schedule():
    config = settings("", "", warmup=0.1, decay=0.4, lr=1.0, lr_end=0.1)
    assert learning_rate(config, 0) < 0.05 and learning_rate(config, 0.5) == 1.0
    assert learning_rate(config, 0.8) == pytest.approx(0.55) and learning_rate(config, 1.0) == pytest.approx(0.1)


def test_lambda_is_log_spaced():
    low, middle, high = level_lambda(FAST, torch.tensor([0.0, 31.5, 63.0])).tolist()
    assert (low, high) == pytest.approx(FAST.lambda_range) and middle == pytest.approx((low * high) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"minutes": 1}, "either steps or minutes"),
        ({"steps": None}, "either steps or minutes"),
        ({"crop": 100}, "multiple of 64"),
        ({"metric": "vmaf"}, "metric"),
        ({"metric": "ms-ssim"}, "192"),
        ({"lmbda": 0.01}, "takes no lambda"),
        ({"metric": "ms-ssim", "crop": 192}, "trained for MSE"),
    ],
)
def test_settings_that_do_not_fit(folder, tmp_path, config, changes, why):
    with pytest.raises(ValueError, match=why):
        train(settings(folder, tmp_path, config, **changes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_capture_on_cuda(folder, tmp_path, config):
    trainer = Trainer(settings(folder, tmp_path, config, bf16=True), device="cuda")
    for _ in range(20):
        trainer.step(0.5)
    assert trainer.graph is not None
    assert trainer.read_measures(20)["loss"] > 0
