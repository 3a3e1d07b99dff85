"""Training, at toy size: it learns, it goes on from a checkpoint, and it says what does not fit."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from mlic.data import load_pictures, random_crops
from mlic.model import build_model
from mlic.train import TrainConfig, learning_rate, level_lambda, loss_terms, train


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


def settings(folder, out, **changes):
    defaults = dict(model="fast", data=(str(folder),), out=str(out), steps=6, batch=1, crop=64, log_every=2, bf16=False)
    return TrainConfig(**{**defaults, **changes})


@torch.no_grad()
def measure(model, folder) -> float:
    """Loss of one crop at a middle rate, without noise."""
    x = random_crops(load_pictures([folder], smallest=64), 1, 64, torch.Generator().manual_seed(3))
    level = torch.tensor([2.0])
    bpp, mse = loss_terms(model.eval(), x, level, noisy=False)
    return float(bpp + level_lambda(model.config, level) * 255**2 * mse)


def test_loss_falls(folder, tmp_path, small_models):
    config = small_models["fast"].config
    torch.manual_seed(0)
    before = measure(build_model(config), folder)
    after = measure(train(settings(folder, tmp_path, model=config, steps=60, batch=2, log_every=20, lr=1e-3)), folder)
    assert after < 0.8 * before
    assert [row[0] for row in csv.reader((tmp_path / "log.csv").open())] == ["20", "40", "60"]


def test_a_finished_run_is_not_trained_again(folder, tmp_path, small_models):
    config = small_models["fast"].config
    first = train(settings(folder, tmp_path, model=config, steps=2))
    second = train(settings(folder, tmp_path, model=config, steps=2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_unreadable_and_small_pictures_are_left_out_with_a_word(folder, capfd):
    assert len(load_pictures([folder], smallest=64)) == 3
    said = capfd.readouterr().err
    assert "broken.png" in said and "tiny.png" in said


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        load_pictures([tmp_path], smallest=64)


def test_crops_are_pieces_of_the_pictures(folder):
    pictures = load_pictures([folder], smallest=64)
    crops = random_crops(pictures, 8, 64, torch.Generator().manual_seed(1))
    assert crops.shape == (8, 3, 64, 64) and 0 <= crops.min() and crops.max() <= 1
    values = {v for picture in pictures for v in (picture.float() / 255).unique().tolist()}
    assert set(crops.unique().tolist()) <= values


def test_schedule():
    config = settings("", "", warmup=0.1, decay=0.4, lr=1.0, lr_end=0.1)
    assert learning_rate(config, 0) < 0.05 and learning_rate(config, 0.5) == 1.0
    assert learning_rate(config, 0.8) == pytest.approx(0.55) and learning_rate(config, 1.0) == pytest.approx(0.1)


def test_lambda_is_log_spaced():
    from mlic.config import FAST

    low, middle, high = level_lambda(FAST, torch.tensor([0.0, 31.5, 63.0])).tolist()
    assert (low, high) == pytest.approx(FAST.lambda_range) and middle == pytest.approx((low * high) ** 0.5)


def test_settings_that_do_not_fit(folder, tmp_path):
    with pytest.raises(ValueError, match="either steps or minutes"):
        train(settings(folder, tmp_path, minutes=1))
    with pytest.raises(ValueError, match="takes no lambda"):
        train(settings(folder, tmp_path, lmbda=0.01))
