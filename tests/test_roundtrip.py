"""A picture in, a file out, the same reconstruction back: all models, odd sizes, grey, monotone quality."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import mlic
from mlic.codec import decode_picture, encode_picture
from mlic.config import CONFIGS
from mlic.container import MlicFile
from mlic.metrics import psnr
from mlic.pictures import read_picture
from mlic.weights import find_weights


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (65, 64), (768, 512)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_gives_the_encoders_reconstruction(small_models, name, size):
    model = small_models[name]
    width, height = size
    rows, columns = np.mgrid[:height, :width][..., None]
    waves = 127 + 60 * np.sin(rows / 7 + np.arange(3)) + 60 * np.sin(columns * rows / 900)
    picture = read_picture(waves.astype(np.uint8))
    encoded = encode_picture(model, picture, 70 if model.config.variable_rate else None, reconstruct=True)
    file = MlicFile.from_bytes(encoded.data)
    assert (file.width, file.height) == size
    decoded = decode_picture(model, file)
    assert decoded.shape == (height, width, 3)
    assert np.array_equal(decoded, encoded.reconstruction)


def test_packaged_weights_round_trip(photo):
    data = mlic.encode(photo, quality=80)
    back = np.asarray(mlic.decode(data))
    assert back.shape == photo.shape
    assert psnr(back, photo) > 25
    assert len(data) < photo.size / 4


def test_grey_stays_grey(photo):
    grey = Image.fromarray(photo).convert("L")
    back = mlic.decode(mlic.encode(grey, quality=80))
    assert back.mode == "L" and back.size == grey.size
    assert psnr(np.asarray(back.convert("RGB")), np.asarray(grey.convert("RGB"))) > 25


def test_quality_is_monotone(photo):
    sizes, qualities = [], []
    for quality in range(1, 101, 9):
        data = mlic.encode(photo, quality=quality)
        sizes.append(len(data))
        qualities.append(psnr(np.asarray(mlic.decode(data)), photo))
    assert sizes == sorted(sizes) and sizes[-1] > 4 * sizes[0]
    assert qualities == sorted(qualities)


@pytest.mark.parametrize("quality", [0, 101, float("nan"), "50"])
def test_quality_out_of_range(photo, quality):
    with pytest.raises(ValueError, match="1 to 100"):
        mlic.encode(photo, quality=quality)


def test_numbers_of_numpy_and_paths_of_models(photo):
    path = find_weights("fast")
    data = mlic.encode(photo, np.float32(50), path, effort=np.int64(0))
    assert data == mlic.encode(photo, 50, effort=0) == mlic.encode(photo, np.arange(50, 51)[0], str(path), effort=0)
    assert np.array_equal(mlic.decode(data, model=path), mlic.decode(data))
    x = torch.from_numpy(photo).permute(2, 0, 1)
    assert mlic.encode(x, 50, path, effort=0) == mlic.encode_batch(x[None], 50, path, effort=0)[0] == data


def test_quality_for_a_model_of_one_rate(small_models, photo):
    with pytest.raises(ValueError, match="one rate"):
        mlic.encode(photo, quality=50, model=small_models["mlic"])


def test_other_weights_are_refused_with_the_digest_needed(small_models, photo):
    data = mlic.encode(photo, model=small_models["fast"], quality=50)
    with pytest.raises(mlic.WeightsError, match=small_models["fast"].digest[:8].hex()):
        mlic.decode(data)
    assert mlic.decode(data, model=small_models["fast"]).size == (photo.shape[1], photo.shape[0])


def test_a_decoder_that_went_astray_says_so(small_models, photo):
    """Other probabilities than the encoder's, here from damaged parameters behind an unchanged digest."""
    import copy

    model = small_models["fast"]
    data = mlic.encode(photo, model=model, quality=90, exact=False)
    other = copy.deepcopy(model)
    other.h_s[-1].bias += 0.05
    with pytest.raises(mlic.DamagedFile, match="astray"):
        mlic.decode(data, model=other)


def test_a_picture_too_large_for_its_bytes_is_refused_before_memory_is_taken(small_models, photo):
    file = MlicFile.from_bytes(mlic.encode(photo, model=small_models["fast"], quality=10))
    huge = dataclasses.replace(file, width=1 << 13, height=1 << 14)
    with pytest.raises(mlic.DamagedFile, match="too few for 8192x16384"):
        mlic.decode(huge.to_bytes(), model=small_models["fast"])


def test_what_is_lost_is_a_warning(photo):
    cmyk = Image.fromarray(photo).convert("CMYK")
    with pytest.warns(UserWarning, match="CMYK"):
        mlic.encode(cmyk)
