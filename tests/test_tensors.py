"""Tensors in and out: files of a batch are those of its pictures alone; shapes that do not fit are said so."""

import numpy as np
import pytest
import torch

import mlic
from mlic.codec import encode_picture
from mlic.config import CONFIGS
from mlic.container import MlicFile
from mlic.errors import PictureError
from mlic.pictures import Picture
from mlic.tensors import decode_array, decode_batch, encode_batch, encode_tensor


@pytest.fixture(scope="module")
def batch(photo) -> torch.Tensor:
    """(3, 3, 64, 70) uint8: parts of a photograph."""
    parts = [photo[top : top + 64, left : left + 70] for top, left in ((0, 0), (16, 26), (9, 5))]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)


def quality_of(model) -> int | None:
    return 60 if model.config.variable_rate else None


@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_a_batch_are_those_of_its_pictures(small_models, batch, name):
    model = small_models[name]
    files = encode_batch(batch, quality_of(model), model)
    alone = [mlic.encode(x.permute(1, 2, 0).numpy(), quality_of(model), model) for x in batch]
    assert files == alone and len(set(files)) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_a_batch_gives_what_decoding_each_gives(small_models, batch, name):
    model = small_models[name]
    files = encode_batch(batch, quality_of(model), model)
    decoded = decode_batch(files, model)
    assert decoded.shape == batch.shape and decoded.dtype == torch.float32
    for x, data in zip(decoded, files):
        alone = torch.from_numpy(decode_array(data, model)).permute(2, 0, 1)
        assert ((x * 255).round() / 255 - x).abs().max() < 1e-6
        difference = (x * 255 - alone).abs()
        assert difference.max() < 1.01 and difference.mean() < 0.01  # a last bit here and there


def test_packaged_weights(batch):
    files = encode_batch(batch, 60)
    assert files == [encode_tensor(x, 60) for x in batch]
    assert (decode_batch(files) - batch / 255).square().mean() < 0.002


def test_floating_point_is_coded_one_by_one(batch):
    """Beside others a picture's nets may have other last bits, and its file would not decode alone."""
    files = encode_batch(batch, 90, exact=False, effort=0)
    assert files == [encode_tensor(x, 90, exact=False, effort=0) for x in batch]
    for x, data in zip(decode_batch(files), files):
        assert np.array_equal((x * 255).round().byte().permute(1, 2, 0).numpy(), decode_array(data))


def test_what_is_no_tensor(batch):
    for given, remedy in ((list(batch), r"torch.stack\(x\)"), (batch.numpy(), r"torch.from_numpy\(x\)"), (None, "a tensor")):
        with pytest.raises(PictureError, match=f"is no tensor: give {remedy}"):
            encode_batch(given)


def test_sides_too_long_for_a_file():
    with pytest.raises(PictureError, match="65536 a side"):
        encode_batch(torch.zeros(1, 3, 1, 70000, dtype=torch.uint8), 50, effort=0)


def test_qualities_depths_and_arithmetic_may_differ_within_a_batch(small_models, photo):
    model = small_models["fast"]
    deep, grey = photo[:64, :64] * np.uint16(257), photo[:64, :64, 1]
    files = [mlic.encode(photo[:64, :64], 10, model), mlic.encode(photo[:64, :64], 95, model)]
    files += [encode_picture(model, Picture(deep), 40).data, mlic.encode(grey, 70, model)]
    together = decode_batch(files, model)
    for x, data, step in zip(together, files, (1 / 255, 1 / 255, 1 / 65535, 1 / 255)):
        difference = (x - decode_batch([data], model)[0]).abs()
        assert difference.max() < 2.01 * step and difference.mean() < 0.1 * step
    assert torch.equal(together[3, 0], together[3, 1]) and torch.equal(together[3, 0], together[3, 2])
    assert (together[2] * 65535).round().sub(together[2] * 65535).abs().max() < 0.01
    mixed = [*files, mlic.encode(photo[:64, :64], 50, model, exact=False)]
    assert (decode_batch(mixed, model)[:4] - together).abs().mean() < 0.01 / 255


def test_tiled_files_decode_in_a_batch(small_models, photo):
    model = small_models["fast"]
    tiled = encode_picture(model, Picture(photo), 50, tile=64).data
    alone = decode_array(tiled, model)
    together = decode_batch([tiled, mlic.encode(photo, 50, model)], model)
    assert np.array_equal((together[0] * 255).round().byte().permute(1, 2, 0).numpy(), alone)


def test_large_pictures_of_a_batch_are_tiled(small_models, batch, monkeypatch):
    monkeypatch.setattr("mlic.tiles.LARGE", 1000)
    monkeypatch.setattr("mlic.tiles.SIDE", 64)
    model = small_models["fast"]
    files = encode_batch(batch, 60, model)
    assert files == [mlic.encode(x.permute(1, 2, 0).numpy(), 60, model) for x in batch]
    assert MlicFile.from_bytes(files[0]).tile == 64


def test_float_tensors_are_not_rounded_to_8_bits(small_models, batch):
    model = small_models["fast"]
    whole, between = batch / 255, (batch / 255 + 0.4 / 255).clamp(0, 1)
    files = encode_batch(between, 100, model)
    assert files == [encode_tensor(x, 100, model) for x in between]
    rounded = encode_batch((between * 255).round().byte(), 100, model)
    assert all(a != b for a, b in zip(files, rounded))
    assert encode_batch(whole, 100, model) == encode_batch(batch, 100, model) == rounded
    assert MlicFile.from_bytes(files[0]).depth == 8
    half = encode_batch(whole.half(), 60, model)
    assert decode_batch(half, model).shape == batch.shape


def test_grey(small_models, batch):
    model = small_models["fast"]
    files = encode_batch(batch[:, 1:2], 80, model)
    assert files == [encode_tensor(x[1:2], 80, model) for x in batch]
    assert mlic.decode(files[0], model).mode == "L"
    assert decode_array(files[0], model).shape == (64, 70, 1)
    x = decode_batch(files, model)
    assert x.shape == (3, 3, 64, 70) and torch.equal(x[:, 0], x[:, 2])


def test_arrays_have_alpha_and_16_bits(small_models, photo):
    model = small_models["fast"]
    alpha = np.arange(80 * 96).reshape(80, 96).astype(np.uint16) * 8
    array = decode_array(encode_picture(model, Picture(photo * np.uint16(257), alpha=alpha), 50).data, model)
    assert array.shape == (80, 96, 4) and array.dtype == np.uint16
    assert np.array_equal(array[..., 3], alpha)
    small = Picture(photo, grey=True, alpha=alpha.astype(np.uint8))
    assert decode_array(encode_picture(model, small, 50).data, model).shape == (80, 96, 2)


def test_a_gradient_is_neither_needed_nor_kept(small_models, batch):
    x = (batch / 255).requires_grad_()
    files = encode_batch(x, 60, small_models["fast"])
    assert not decode_batch(files, small_models["fast"]).requires_grad


@pytest.mark.parametrize(
    "shape, remedy",
    [
        ((20, 30), "x[None]"),
        ((20, 30, 3), "x.permute(2, 0, 1)"),
        ((4, 20, 30), "x[:3]"),
        ((1, 3, 20, 30), "x[0]"),
        ((2, 3, 20, 30), "encode_batch"),
    ],
)
def test_shapes_of_a_picture(shape, remedy):
    with pytest.raises(mlic.PictureError) as error:
        encode_tensor(torch.zeros(shape))
    assert str(shape) in str(error.value) and remedy in str(error.value)


@pytest.mark.parametrize(
    "shape, remedy",
    [
        ((3, 20, 30), "x[None]"),
        ((7, 20, 30), "x[:, None]"),
        ((7, 20, 30, 3), "x.permute(0, 3, 1, 2)"),
        ((7, 4, 20, 30), "x[:, :3]"),
        ((0, 3, 20, 30), "no pixels"),
    ],
)
def test_shapes_of_a_batch(shape, remedy):
    with pytest.raises(mlic.PictureError) as error:
        encode_batch(torch.zeros(shape))
    assert str(shape) in str(error.value) and remedy in str(error.value)


@pytest.mark.parametrize(
    "x, remedy",
    [
        (torch.full((3, 8, 8), 255.0), "x / 255"),
        (torch.full((3, 8, 8), -0.1), "x.clamp"),
        (torch.full((3, 8, 8), torch.nan), "finite"),
        (torch.zeros((3, 8, 8), dtype=torch.int64), "torch.uint8"),
    ],
)
def test_values(x, remedy):
    with pytest.raises(mlic.PictureError, match=remedy):
        encode_tensor(x)


def test_decoded_tensors_are_ordinary_ones(small_models, batch):
    back = mlic.decode_batch(mlic.encode_batch(batch, model=small_models["mlic"]), small_models["mlic"])
    torch.nn.Conv2d(3, 2, 3)(back).mean().backward()
    back.mul_(2).requires_grad_()


def test_a_program_s_default_type_does_not_matter(small_models, batch):
    model, here = small_models["fast"], torch.get_default_dtype()
    files = mlic.encode_batch(batch, 60, model, effort=2)
    wanted = mlic.decode_batch(files, model)
    torch.set_default_dtype(torch.float64)
    try:
        assert mlic.encode_batch(batch, 60, model, effort=2) == files
        assert torch.equal(mlic.decode_batch(files, model), wanted)
    finally:
        torch.set_default_dtype(here)


def test_files_that_do_not_go_together(small_models, batch):
    model = small_models["fast"]
    files = encode_batch(batch[:2], 60, model)
    with pytest.raises(mlic.PictureError, match="2 sizes .*20x10, 70x64"):
        decode_batch([*files, encode_tensor(torch.rand(3, 10, 20), 60, model)], model)
    with pytest.raises(mlic.PictureError, match="at least one"):
        decode_batch([])
    with pytest.raises(mlic.DamagedFile, match="file 1 of the batch"):
        decode_batch([files[0], files[1][:-9]], model)
    with pytest.raises(mlic.WeightsError, match=model.digest[:8].hex()):
        decode_batch(files)


def test_encode_takes_tensors(batch):
    assert mlic.encode(batch[0], 60) == encode_tensor(batch[0], 60)
