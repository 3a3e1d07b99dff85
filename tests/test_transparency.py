from __future__ import annotations

import zlib

import numpy as np
import pytest

from mlic.pictures import read_picture
from mlic.transparency import fill_transparent, on_white


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_visible_pixels_stay(photo, dtype):
    draw = np.random.default_rng(0)
    pixels = photo.astype(dtype) * np.iinfo(dtype).max // 255
    for share in (0.02, 0.5, 0.98):
        alpha = (draw.random((80, 96)) < share) * draw.integers(1, 256, (80, 96)).astype(dtype)
        before = pixels.copy()
        filled = fill_transparent(pixels, alpha)
        assert filled.dtype == dtype and np.array_equal(filled[alpha > 0], pixels[alpha > 0])
        assert np.array_equal(pixels, before)
        low, high = pixels[alpha > 0].min(0), pixels[alpha > 0].max(0)
        assert (filled >= low).all() and (filled <= high).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (600, 3), (513, 257)])
def test_the_hidden_colour_is_that_of_the_neighbours(size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    alpha = np.zeros(size, np.uint8)
    alpha[size[0] // 2, size[1] // 3] = 9
    pixels[alpha > 0] = (10, 200, 30)
    assert (fill_transparent(pixels, alpha) == (10, 200, 30)).all()


def test_nothing_visible_is_flat(photo):
    filled = fill_transparent(photo, np.zeros((80, 96), np.uint8))
    assert (filled == filled[0, 0]).all() and filled.shape == photo.shape


def test_nothing_hidden_is_untouched(photo):
    assert fill_transparent(photo, np.full((80, 96), 1, np.uint8)) is photo


def test_smooth_pictures_are_continued():
    """Half of a ramp hidden in spots: the ramp is what is filled in; and no steps anywhere."""
    ramp = np.linspace(0, 255, 640)[:, None, None].repeat(300, 1).repeat(3, 2).astype(np.uint8)  # several bands of rows
    hidden = np.add.outer(np.arange(640) // 5 % 2, np.arange(300) // 5 % 2) == 1
    spoilt = np.where(hidden[..., None], np.random.default_rng(2).integers(0, 256, ramp.shape), ramp).astype(np.uint8)
    filled = fill_transparent(spoilt, np.where(hidden, 0, 255).astype(np.uint8))
    assert np.abs(filled.astype(int) - ramp).max() <= 4

    hidden = np.zeros((640, 300), bool)
    hidden[100:500, 50:250] = True
    filled = fill_transparent(spoilt, np.where(hidden, 0, 255).astype(np.uint8))[120:480, 70:230].astype(int)
    assert np.abs(np.diff(filled, axis=0)).max() <= 8 and np.abs(np.diff(filled, axis=1)).max() <= 8


def test_hidden_noise_costs_nothing(photo):
    """What the fill is for: colours under transparency, here noise, no longer take space."""
    hidden = np.zeros((80, 96), bool)
    hidden[10:70, 10:86] = True
    noise = np.where(hidden[..., None], np.random.default_rng(3).integers(0, 256, photo.shape), photo).astype(np.uint8)
    picture = read_picture(np.dstack([noise, np.where(hidden, 0, 255).astype(np.uint8)]))

    def size(pixels: np.ndarray) -> int:
        return len(zlib.compress(np.diff(pixels, axis=0).tobytes()))

    assert size(picture.pixels) < 0.8 * size(photo) and size(picture.pixels) < 0.5 * size(noise)
    assert np.array_equal(picture.pixels[~hidden], photo[~hidden])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_on_white(photo, dtype):
    most = np.iinfo(dtype).max
    alpha = np.random.default_rng(4).integers(0, most + 1, (80, 96)).astype(dtype)
    alpha[0], alpha[1] = 0, most
    pixels = photo.astype(dtype) * (most // 255)
    laid = on_white(pixels, alpha)
    share = alpha[..., None] / most
    assert laid.dtype == dtype and np.abs(laid - (pixels * share + most * (1 - share))).max() <= 0.51
    assert (laid[0] == most).all() and np.array_equal(laid[1], pixels[1])
