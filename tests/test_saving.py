from __future__ import annotations

import dataclasses
import io
import os
import struct
import warnings

import numpy as np
import pytest
from picture_files import SRGB, deep_values
from PIL import ExifTags, Image

from mlic.errors import PictureError
from mlic.pictures import Picture, read_picture
from mlic.saving import picture_bytes, to_pillow, write_whole

EXIF = bytes.fromhex(  # Make: Cam; a table at 38 with ExposureTime: 1/4
    "4d4d002a00000008 0002 010f 0002 00000004 43616d00 8769 0004 00000001 00000026 00000000"
    "0001 829a 0005 00000001 00000038 00000000 00000001 00000004"
)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a>\xc3\xa4</a></x:xmpmeta>'
METADATA = {"icc": SRGB, "exif": EXIF, "xmp": XMP}


def picture_of(photo: np.ndarray, channels: int, *, deep: bool = False, **fields) -> Picture:
    """1..4 channels: grey, grey and alpha, RGB, RGBA. With metadata."""
    values = np.dstack([photo, photo[..., 1] | 1])[..., 4 - channels if channels < 3 else 0 :][..., :channels]
    if channels == 1:
        values = photo[..., 1:2]
    if deep:
        values = deep_values(photo, channels)
    return dataclasses.replace(read_picture(values), **{**METADATA, **fields})


def same(a: Picture, b: Picture) -> bool:
    return (
        a.pixels.dtype == b.pixels.dtype
        and np.array_equal(a.pixels, b.pixels)
        and (b.alpha is None if a.alpha is None else np.array_equal(a.alpha, b.alpha))
    )


@pytest.mark.parametrize(
    "channels, deep, mode",
    [(1, False, "L"), (2, False, "LA"), (3, False, "RGB"), (4, False, "RGBA"),
     (1, True, "I;16"), (2, True, "LA"), (3, True, "RGB"), (4, True, "RGBA")],
)  # fmt: skip
def test_to_pillow(photo, channels, deep, mode):
    picture = picture_of(photo, channels, deep=deep)
    image = to_pillow(picture)
    assert image.mode == mode and image.size == (96, 80)
    values = picture.pixels[..., :1] if channels < 3 else picture.pixels
    if channels in (2, 4):
        values = np.dstack([values, picture.alpha])
    scale = 257 if deep and mode != "I;16" else 1
    assert np.abs(np.asarray(image).reshape(values.shape).astype(float) * scale - values).max() <= scale / 2
    assert image.info["icc_profile"] == SRGB and image.info["xmp"] == XMP and image.getexif()[271] == "Cam"
    assert to_pillow(picture_of(photo, channels, icc=None, exif=None, xmp=None)).info == {}


def test_grey_is_the_mean_of_the_channels(photo):
    assert np.abs(np.asarray(to_pillow(Picture(photo, grey=True))) - photo.mean(2)).max() <= 0.5
    deep = deep_values(photo, 3)
    assert np.abs(np.asarray(to_pillow(Picture(deep, grey=True))) - deep.mean(2)).max() <= 0.5


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("extension", [".png", ".PNG"])
def test_png_keeps_everything(photo, channels, deep, extension):
    picture = picture_of(photo, channels, deep=deep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = picture_bytes(picture, extension)
    back = read_picture(io.BytesIO(data))
    assert data[24] == (16 if deep else 8) and back.notes == ()
    assert same(back, picture) and back.grey == (channels < 3)
    assert (back.icc, back.exif, back.xmp) == (SRGB, EXIF, XMP)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (257, 5), (512, 3)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_deep_png_of_odd_sizes(size, channels):
    values = np.random.default_rng(1).integers(1, 65536, (*size, channels), dtype=np.uint16)
    values[size[0] // 2 :] = values[0, 0]  # something flat too
    picture = read_picture(values)
    assert same(read_picture(io.BytesIO(picture_bytes(picture, ".png"))), picture)


def test_deep_png_is_filtered(photo):
    """Without row filters this takes 40 KiB."""
    smooth = np.repeat(np.repeat(photo.astype(np.uint16) * 257, 4, 0), 4, 1)[..., :1]
    assert len(picture_bytes(read_picture(smooth), ".png")) < 20000


@pytest.mark.parametrize("extension", [".webp", ".tiff", ".bmp", ".ppm", ".jp2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_outputs(photo, extension, channels):
    picture = picture_of(photo, channels, icc=None, exif=None, xmp=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to lose
        assert same(read_picture(io.BytesIO(picture_bytes(picture, extension))), picture)


@pytest.mark.parametrize("extension", [".webp", ".tiff"])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_kept_where_the_format_has_it(photo, extension, channels):
    picture = picture_of(photo, channels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(read_picture(io.BytesIO(picture_bytes(picture, extension))), picture)


@pytest.mark.parametrize("extension", [".jpg", ".JPEG", ".webp", ".tiff", ".avif"])
def test_metadata_is_kept_where_the_format_has_it(photo, extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = read_picture(io.BytesIO(picture_bytes(picture_of(photo, 3), extension)))
    assert back.icc == SRGB and back.xmp == XMP
    exif = Image.Exif()
    exif.load(back.exif)
    assert exif[271] == "Cam" and exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] == 0.25


def test_jpeg_output_is_close(photo):
    for extension in (".jpg", ".jpeg", ".JPG"):
        with Image.open(io.BytesIO(picture_bytes(Picture(photo), extension))) as back:
            assert back.format == "JPEG" and np.abs(np.asarray(back).astype(float) - photo).mean() < 5


@pytest.mark.parametrize(
    "extension, channels, deep, fields, lost",
    [
        (".jpg", 4, False, {}, "JPEG: transparency is laid on white; .png keeps everything"),
        (".jpg", 2, True, {}, "JPEG: transparency is laid on white, reduced to 8 bits per channel"),
        (".jpg", 3, False, {"exif": EXIF + bytes(70000)}, "JPEG: EXIF data left out"),
        (".jpg", 3, False, {"xmp": XMP + bytes(70000)}, "JPEG: XMP data left out"),
        (".tiff", 3, True, {}, "TIFF: reduced to 8 bits per channel"),
        (".webp", 1, True, {}, "WEBP: reduced to 8 bits per channel"),
        (".bmp", 3, False, {}, "BMP: colour profile left out, EXIF data left out, XMP data left out"),
    ],
)
def test_what_is_lost_is_said(photo, extension, channels, deep, fields, lost):
    with pytest.warns(UserWarning, match=lost) as warned:
        data = picture_bytes(picture_of(photo, channels, deep=deep, **fields), extension)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert read_picture(io.BytesIO(data)).pixels.shape == photo.shape


def test_what_is_laid_on_white(photo):
    alpha = np.full(photo.shape[:2], 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 128
    for deep in (False, True):
        scale = 257 if deep else 1
        kind = np.uint16 if deep else np.uint8
        picture = Picture(photo.astype(kind) * kind(scale), alpha=alpha.astype(kind) * kind(scale))
        with pytest.warns(UserWarning, match="laid on white"):
            back = read_picture(io.BytesIO(picture_bytes(picture, ".bmp"))).pixels
        assert (back[:, :10] == 255).all() and np.array_equal(back[:, 20:], photo[:, 20:])
        half = photo[:, 10:20] * (128 / 255) + 255 * (127 / 255)
        assert np.abs(back[:, 10:20] - half).max() <= 0.5 + 0.01 * scale


def test_deep_grey_tiff_stays_deep(photo):
    picture = picture_of(photo, 1, deep=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(read_picture(io.BytesIO(picture_bytes(picture, ".tif"))), picture)


def test_exif_data_that_cannot_be_written_is_left_out(photo):
    """A resolution that is a text: Pillow's writer of TIFF files raises a TypeError."""
    exif = b"MM\0*" + struct.pack(">IHHHI", 8, 1, 282, 2, 3) + b"72\0\0" + bytes(4)
    with pytest.warns(UserWarning, match="TIFF: damaged EXIF data left out") as warned:
        back = read_picture(io.BytesIO(picture_bytes(Picture(photo, exif=exif), ".tif")))
    assert len(warned) == 1 and np.array_equal(back.pixels, photo)


@pytest.mark.parametrize("extension, message", [("", "without an extension"), (".txt", "type .txt"), (".cur", ".cur")])
def test_outputs_that_cannot_be(photo, extension, message):
    with pytest.raises(PictureError, match=message):
        picture_bytes(Picture(photo), extension)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_registered_output_works_or_is_a_picture_error(photo, channels, deep):
    failed = set()
    for extension in Image.registered_extensions():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture_bytes(picture_of(photo, channels, deep=deep), extension)
        except PictureError as error:
            failed.add(extension)
            assert len(str(error).splitlines()) == 1
    assert not failed & {".png", ".jpg", ".tif", ".webp", ".avif", ".bmp", ".ppm", ".gif", ".tga", ".ico", ".jp2"}


def test_write_whole(tmp_path):
    target = tmp_path / ("long name " * 24 + "ä.bin")
    write_whole(target, b"one")
    write_whole(target, b"two")
    assert target.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["replace", "write"])
def test_write_whole_leaves_nothing_behind(tmp_path, monkeypatch, error, step):
    def fail(*_):
        raise error

    def write_half(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise error

    monkeypatch.setattr(*((os, "replace", fail) if step == "replace" else (type(tmp_path), "write_bytes", write_half)))
    old = tmp_path / "old.bin"
    old.write_text("old")
    for target in (tmp_path / "new.bin", old):
        with pytest.raises(type(error)) as raised:
            write_whole(target, b"data")
        if isinstance(error, OSError):
            assert raised.value.strerror == f"cannot write {target}: No space left on device"
            assert raised.value.errno == 28
    assert [path.name for path in tmp_path.iterdir()] == ["old.bin"]
    assert old.read_text() == "old"


def test_write_whole_says_where(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "none" / "x", tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(OSError, match="cannot write .*: "):
            write_whole(target, b"data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="needs links, devices and pipes in the file system")
def test_write_whole_through_links_and_into_devices(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for data in (b"one", b"two"):
        write_whole(link, data)
        assert link.is_symlink() and real.read_bytes() == data

    terminal, device = os.openpty()  # /dev/null would be at risk should this go wrong
    name = os.ttyname(device)
    write_whole(tmp_path / name, b"data")
    assert os.path.exists(name) and not os.path.isfile(name)
    assert os.read(terminal, 100) == b"data"
    os.close(terminal), os.close(device)
