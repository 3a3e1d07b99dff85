"""A picture in, a file out, the same reconstruction back: all models, odd sizes, grey, monotone quality."""

import copy
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mlic
from mlic import codec
from mlic.codec import decode_file, encode_picture
from mlic.coder import SymbolEncoder
from mlic.config import CONFIGS
from mlic.container import NO_QUALITY, MlicFile
from mlic.exact import exact_twin
from mlic.feedback import search_with_feedback
from mlic.metrics import psnr
from mlic.pictures import Picture, read_picture
from mlic.refine import Search
from mlic.strategies import Write
from mlic.tiles import Box
from mlic.weights import find_weights, load_model, save_weights

RECORDED = [(20, 147, 31.85), (50, 227, 36.70), (80, 419, 39.71)]  # of the packaged weights on `photo`: quality, bytes, dB


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (65, 64), (512, 384)], ids=lambda s: f"{s[0]}x{s[1]}")
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
    decoded = decode_file(model, file).pixels
    assert decoded.shape == (height, width, 3)
    assert np.array_equal(decoded, encoded.reconstruction)


def test_packaged_weights_round_trip(photo):
    data = mlic.encode(photo, quality=80)
    back = np.asarray(mlic.decode(data))
    assert back.shape == photo.shape
    assert psnr(back, photo) > 25
    assert len(data) < photo.size / 4


@pytest.mark.parametrize(("quality", "size", "decibel"), RECORDED)
def test_packaged_weights_compress_as_they_did(photo, quality, size, decibel):
    """With the search that users have. New weights record new figures, better ones if all is well."""
    data = mlic.encode(photo, quality, effort=4)
    assert abs(len(data) - size) <= 0.01 * size + 4  # a word of the coder is four bytes
    assert psnr(np.asarray(mlic.decode(data)), photo) == pytest.approx(decibel, abs=0.05)


@torch.inference_mode()
def test_symbols_are_chosen_as_the_search_says(photo):
    """At the level's price of an error, not the config's; in a batch as well."""
    model, picture = load_model("fast"), Picture(photo)
    file = MlicFile.from_bytes(encode_picture(model, picture, 60, effort=4).data)
    level, whole = codec.level_tensor(model, file.quality), Box(0, 0, *photo.shape[:2])
    search, box = Search(model, 4, level), whole.aligned(64)
    x, streams = codec.to_tensor(model, photo, box), []
    for gaussian in (search.gaussian, model.gaussian):
        y, z, feedback = search_with_feedback(search, x, part=box, seen=box, whole=whole)
        symbols = SymbolEncoder(model.tables, codec.prior_row(model, file.quality))
        exact_twin(model).code(Write(y, z, model.config.slices, gaussian, [symbols], feedback), level)
        streams.append(symbols.finish()[0])
    assert file.tiles[0].stream == streams[0] != streams[1]
    batch = torch.from_numpy(photo).permute(2, 0, 1)[None]
    assert MlicFile.from_bytes(mlic.encode_batch(batch, 60, effort=4)[0]).tiles == file.tiles


def test_grey_stays_grey(photo):
    grey = Image.fromarray(photo).convert("L")
    back = mlic.decode(mlic.encode(grey, quality=80))
    assert back.mode == "L" and back.size == grey.size
    assert psnr(np.asarray(back.convert("RGB")), np.asarray(grey.convert("RGB"))) > 25


def test_quality_is_monotone(photo):
    sizes, qualities = [], []
    for quality in range(1, 101, 16):
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


def test_whatever_holds_a_file_or_a_picture(small_models, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_models["fast"]
    Image.fromarray(photo).save("a.png")
    save_weights("fast.safetensors", model)
    data, content = mlic.encode("a.png", model=model), Path("a.png").read_bytes()
    same = [content, memoryview(content), io.BytesIO(content), mlic.read_picture("a.png"), np.asmatrix(photo[..., 0])]
    assert [mlic.encode(source, model=model) == data for source in same] == [True] * 4 + [False]
    Path("a.mlic").write_bytes(data)
    for source in ("a.mlic", Path("a.mlic"), io.BytesIO(data), memoryview(data), bytearray(data)):
        assert np.array_equal(mlic.decode_array(source, model), mlic.decode(data, model))
    with pytest.raises(FileNotFoundError):
        mlic.decode("none.mlic")
    with pytest.raises(TypeError):
        mlic.decode(7)
    assert mlic.encode_to_target("fast.safetensors", "a.png", bpp=2, effort=0).note is None
    assert {"encode", "decode", "load_model"} <= set(dir(mlic))


def test_a_name_from_a_file_is_never_a_path(small_models, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights("x.safetensors", small_models["fast"])
    file = MlicFile.from_bytes(mlic.encode(photo, model=small_models["fast"]))
    renamed = dataclasses.replace(file, model="x.safetensors").to_bytes()
    with pytest.raises(mlic.WeightsError, match="give its weights file"):
        mlic.decode(renamed)
    assert mlic.decode(renamed, model="x.safetensors").size == (file.width, file.height)


@pytest.mark.parametrize("decode", [mlic.decode, lambda data, model: mlic.decode_batch([data], model)], ids=["one", "batch"])
def test_qualities_that_no_encoder_writes(small_models, photo, decode):
    for name, quality, error in (
        ("fast", NO_QUALITY, mlic.DamagedFile),
        ("fast", 3 * 256 + 1, mlic.UnsupportedFile),
        ("mlic", 256, mlic.DamagedFile),
    ):
        file = MlicFile.from_bytes(mlic.encode(photo, model=small_models[name]))
        with pytest.raises(error):
            decode(dataclasses.replace(file, quality=quality).to_bytes(), small_models[name])


def test_damaged_weights_and_giant_pictures_are_refused(small_models, photo, monkeypatch):
    model = copy.deepcopy(small_models["fast"])
    model.g_a.linear.bias[0] = float("nan")
    with pytest.raises(mlic.WeightsError, match="not finite"):
        mlic.encode(photo, model=model)
    with pytest.raises(mlic.WeightsError, match="not finite"):
        mlic.encode_batch(torch.from_numpy(photo).permute(2, 0, 1)[None], model=model)
    monkeypatch.setattr(codec, "MAX_PIXELS", photo[..., 0].size - 1)
    with pytest.raises(mlic.PictureError, match="too many"):
        mlic.encode(photo, model=small_models["fast"])


def test_weights_that_only_float_arithmetic_can_take(small_models, photo):
    model = copy.deepcopy(small_models["fast"])
    model.__dict__.pop("_exact_twin", None)
    file = dataclasses.replace(MlicFile.from_bytes(mlic.encode(photo, model=model, exact=False)), exact=True)
    model.h_s[0].weight[0] = 1e4
    for refused in (lambda: mlic.encode(photo, model=model), lambda: mlic.decode(file.to_bytes(), model)):
        with pytest.raises(mlic.WeightsError, match="only float arithmetic is possible"):
            refused()


def test_a_decoder_that_went_astray_says_so(small_models, photo):
    """Other probabilities than the encoder's, here from damaged parameters behind an unchanged digest."""
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
