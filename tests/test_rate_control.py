"""encode_to_target: the search by itself, then real files of a small photograph."""

import dataclasses
import math

import numpy as np
import pytest

import mlic
from mlic.codec import encode_picture, quality_code
from mlic.container import MlicFile
from mlic.pictures import Picture, read_picture
from mlic.rate_control import MAX_PASSES, PATIENCE, encode_to_target, search
from mlic.weights import load_model

CODES, TYPICAL = np.array([0.0, 16128.0]), np.array([-2.0, 2.0])
WINDOW = (-0.02, 0.0, 0.02)


def run(function, window=WINDOW):
    calls = []

    def measure(code):
        assert isinstance(code, int) and 0 <= code <= 16128 and code not in calls
        calls.append(code)
        return function(code)

    return *search(measure, CODES, TYPICAL, window), calls


@pytest.mark.parametrize(
    "function",
    [
        lambda n: 4 * n / 16128 - 2.7,  # as guessed, but shifted
        lambda n: 1.3 * math.log((n + 500) / 9000),  # curved
        lambda n: 3 * (n / 16128) ** 3 - 1,
        lambda n: math.tanh((n - 11000) / 1500),
        lambda n: (n // 40 - 200) / 70,  # in steps
    ],
)
def test_the_search_ends_in_the_window(function):
    code, value, calls = run(function)
    assert -0.02 <= value <= 0 and value == function(code)
    assert len(calls) <= 6


def test_the_search_takes_few_calls_where_the_guess_has_the_right_shape():
    assert len(run(lambda n: 4 * n / 16128 - 2.7)[2]) == 2


def test_a_value_above_is_taken_only_after_patience():
    jump = lambda n: 0.015 if n > 5000 else -0.5  # noqa: E731 (nothing is within the window)
    code, value, calls = run(jump)
    assert value == 0.015 and len(calls) == PATIENCE
    code, value, calls = run(jump, (-0.02, 0.0, 0.01))
    assert value == 0.015 and len(calls) == MAX_PASSES


@pytest.mark.parametrize("value, best", [(5.0, 0), (-5.0, 16128), (math.inf, 0)])
def test_the_search_gives_up_at_the_ends(value, best):
    code, _, calls = run(lambda n: value + n / 1e6)
    assert code == best and len(calls) <= 5


def test_neighbours_on_both_sides_end_the_search():
    code, value, calls = run(lambda n: 1.0 if n >= 3000 else -0.9)
    assert value == -0.9 and len(calls) <= MAX_PASSES


@pytest.fixture(scope="module")
def model():
    return load_model("fast")


def test_each_code_has_a_quality(model):
    assert all(quality_code(model, 1 + 99 * code / 16128) == code for code in range(16129))


@pytest.fixture(scope="module")
def crop():
    picture = read_picture(mlic.__path__[0] + "/samples/kodim23.png")
    return Picture(np.ascontiguousarray(picture.pixels[100:228, 100:292]))


@pytest.mark.parametrize("size", [1000, 2700])
def test_size(model, crop, size):
    result = encode_to_target(model, crop, size=size, effort=0)
    assert 0.98 * size <= len(result.data) == result.reached <= size
    assert result.note is None and result.passes <= 5
    assert encode_picture(model, crop, result.quality, effort=0).data == result.data


def test_bpp_counts_the_whole_file(model, crop):
    heavy = Picture(crop.pixels, exif=b"II*\0" + np.random.default_rng(0).bytes(1000))
    result = encode_to_target(model, heavy, bpp=1, effort=0)
    pixels = crop.pixels.shape[0] * crop.pixels.shape[1]
    assert 0.98 <= result.reached <= 1 and result.reached == pytest.approx(8 * len(result.data) / pixels)
    assert result.note is None and MlicFile.from_bytes(result.data).exif == heavy.exif
    thumbnail = np.random.default_rng(1).bytes(8000)
    for size in (8500, 9000, 10000):
        result = encode_to_target(model, dataclasses.replace(heavy, exif=b"II*\0" + thumbnail), size=size, effort=0)
        assert 0.98 * size <= len(result.data) <= size and result.note is None and result.passes <= 4
    for size in (500, 900, 1100):  # the metadata alone has 1,000
        out_of_reach = encode_to_target(model, heavy, size=size, effort=0)
        assert out_of_reach.quality == 1 and out_of_reach.passes <= 2 and "lowest quality" in out_of_reach.note
    see_through = Picture(crop.pixels, alpha=np.random.default_rng(2).integers(0, 256, crop.pixels.shape[:2], np.uint8))
    least = len(encode_picture(model, see_through, 1, effort=0).data)
    result = encode_to_target(model, see_through, size=least + 1000, effort=0)
    assert least < len(result.data) <= least + 1000 and result.note is None and result.passes <= 4
    floating = encode_to_target(model, crop, bpp=1, exact=False, effort=0)
    assert not MlicFile.from_bytes(floating.data).exact


def test_psnr_is_that_of_the_decoded_picture(model, crop):
    result = encode_to_target(model, crop, psnr=32, effort=0)
    back = np.asarray(mlic.decode(result.data), float)
    decibel = 10 * math.log10(255**2 / np.square(back - crop.pixels).mean())
    assert decibel == pytest.approx(result.reached, abs=1e-4)
    assert abs(result.reached - 32) <= 0.1 and result.note is None and result.passes <= 5


def test_psnr_of_grey_is_that_of_its_mean(model, crop):
    grey = Picture(crop.pixels[..., 1:2].repeat(3, 2), grey=True)
    result = encode_to_target(model, grey, psnr=32, effort=0)
    back = np.asarray(mlic.decode(result.data), float)
    assert back.ndim == 2 and result.note is None
    decibel = 10 * math.log10(255**2 / np.square(back - grey.pixels[..., 0]).mean())
    assert decibel == pytest.approx(result.reached, abs=1e-4) and abs(decibel - 32) <= 0.1


def test_psnr_of_16_bits_and_of_what_shows(model, crop):
    deep = Picture(crop.pixels * np.uint16(257))
    assert encode_to_target(model, deep, psnr=30, effort=0).reached == pytest.approx(30, abs=0.1)
    # larger than `crop`: in a file of a few hundred bytes, PSNR jumps by more than the bound between qualities
    pixels = read_picture(mlic.__path__[0] + "/samples/kodim23.png").pixels[100:356, 100:484]
    alpha = np.zeros(pixels.shape[:2], np.uint8)
    alpha[:128] = 255
    half = Picture(np.where(alpha[..., None] > 0, pixels, 128).astype(np.uint8), alpha=alpha)
    result = encode_to_target(model, half, psnr=33, effort=0)
    back = np.asarray(mlic.decode(result.data), float)[:128, :, :3]
    shown = 10 * math.log10(255**2 / np.square(back - pixels[:128]).mean())
    assert shown == pytest.approx(result.reached, abs=1e-4)
    assert shown == pytest.approx(33, abs=0.11)


@pytest.mark.parametrize(
    "target, which",
    [({"size": 10}, "lowest"), ({"bpp": 40}, "highest"), ({"psnr": 70}, "highest"), ({"psnr": 5}, "lowest")],
)
def test_out_of_reach_gives_the_closest_file_and_says_so(model, crop, target, which):
    result = encode_to_target(model, crop, **target, effort=0)
    assert result.quality == (1 if which == "lowest" else 100)
    assert f"the {which} quality gives" in result.note
    assert len(result.data) == len(encode_picture(model, crop, result.quality, effort=0).data)


def test_targets_are_checked_before_any_work(small_models, crop):
    with pytest.raises(ValueError, match="one of size, bpp and psnr, not none"):
        encode_to_target(small_models["fast"], crop)
    with pytest.raises(ValueError, match="not size and psnr"):
        encode_to_target(small_models["fast"], crop, size=1000, psnr=30)
    with pytest.raises(ValueError, match="positive"):
        encode_to_target(small_models["fast"], crop, bpp=0)
    with pytest.raises(ValueError, match="one rate"):
        encode_to_target(small_models["mlic"], None, size=1000)


def test_progress_is_called_in_each_pass(model, crop):
    calls = []
    result = encode_to_target(model, crop, size=2000, tile=128, effort=0, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)] * result.passes
    assert MlicFile.from_bytes(result.data).tile == 128
