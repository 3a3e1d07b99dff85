from __future__ import annotations

import io
import os
import random
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from mlic.errors import PictureError
from mlic.pictures import picture_bytes, read_picture, to_pillow, write_whole

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ON_WHITE = "transparency is laid on white"
REDUCED = "reduced to 8 bits per channel"


@pytest.fixture
def image(photo) -> Image.Image:
    return Image.fromarray(photo[:40, :50])


def stored(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def test_rgb(image):
    picture = read_picture(stored(image))
    assert np.array_equal(picture.pixels, np.asarray(image))
    assert (picture.grey, picture.icc, picture.notes) == (False, None, ())
    assert picture.pixels.dtype == np.uint8 and picture.pixels.flags.c_contiguous


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey(image, mode):
    image = image.convert(mode)
    picture = read_picture(stored(image))
    assert picture.grey and picture.notes == ()
    assert np.array_equal(picture.pixels, np.asarray(image.convert("L"))[..., None].repeat(3, 2))


@pytest.mark.parametrize("mode, grey", [("LA", True), ("RGBA", False), ("PA", False)])
def test_alpha_is_laid_on_white(image, mode, grey):
    image = image.convert("RGB").convert("P").convert(mode) if mode == "PA" else image.convert(mode)
    opaque = np.asarray(image.convert("RGB"))
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 10, 40))
    alpha.paste(128, (10, 0, 20, 40))
    image.putalpha(alpha)
    picture = read_picture(image)
    assert picture.grey == grey and picture.notes == (ON_WHITE,)
    assert (picture.pixels[:, :10] == 255).all()
    half = opaque[:, 10:20] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(picture.pixels[:, 10:20] - half).max() <= 1.5
    assert np.array_equal(picture.pixels[:, 20:], opaque[:, 20:])


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_unused_alpha_is_no_loss(image, mode):
    picture = read_picture(stored(image.convert(mode)))
    assert picture.notes == () and picture.grey == (mode == "LA")
    assert np.array_equal(picture.pixels, np.asarray(image.convert(mode).convert("RGB")))


def test_palette(image):
    image = image.quantize(16)
    picture = read_picture(stored(image))
    assert not picture.grey and picture.notes == ()
    assert np.array_equal(picture.pixels, np.asarray(image.convert("RGB")))


def test_palette_with_transparency(image):
    image = image.quantize(16)
    index = image.getpixel((0, 0))
    picture = read_picture(stored(image, transparency=index))
    assert picture.notes == (ON_WHITE,)
    clear = np.asarray(image) == index
    assert (picture.pixels[clear] == 255).all()
    assert np.array_equal(picture.pixels[~clear], np.asarray(image.convert("RGB"))[~clear])


def test_grey_with_a_transparent_level_stays_grey(image):
    image = image.convert("L")
    picture = read_picture(stored(image, transparency=image.getpixel((0, 0))))
    assert picture.grey and picture.notes == (ON_WHITE,)
    assert (picture.pixels[0, 0] == 255).all()


def test_cmyk(image):
    image = image.convert("CMYK")
    picture = read_picture(stored(image, "TIFF", icc_profile=SRGB))
    assert picture.notes == ("converted from CMYK to RGB",)
    assert picture.icc is None  # it described the other colour space
    assert np.array_equal(picture.pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX"])
def test_other_colour_spaces(image, mode):
    image = image.convert(mode) if mode != "LAB" else Image.new(mode, (5, 4))
    picture = read_picture(image)
    assert picture.notes == (f"converted from {mode} to RGB",)
    assert np.array_equal(picture.pixels, np.asarray(image.convert("RGB")))


def test_16_bit_png():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    picture = read_picture(stored(Image.fromarray(values * 257)))
    assert picture.grey and picture.notes == (REDUCED,)
    assert np.array_equal(picture.pixels[..., 0], values)


def test_dark_16_bit_png_stays_dark():
    picture = read_picture(stored(Image.fromarray(np.full((4, 4), 200, np.uint16))))
    assert picture.pixels.max() == 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_values(dtype):
    values = np.arange(256).reshape(16, 16)
    for scale in (1, 257):
        picture = read_picture(Image.fromarray((values * scale).astype(dtype)))
        assert picture.grey and picture.notes == (REDUCED,)
        assert np.array_equal(picture.pixels[..., 0], values)
    picture = read_picture(Image.fromarray(np.array([[-5, 3, 100]], dtype)))
    assert picture.pixels[0, :, 0].tolist() == [0, 3, 100]


def test_float_tiff_with_nan():
    values = np.full((4, 4), 7, np.float32)
    values[0, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read_picture(stored(Image.fromarray(values), "TIFF"))
    assert picture.pixels[1, 1, 0] == 7


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind):
    upright = np.zeros((48, 32, 3), np.uint8)  # four flat corners: red, green / blue, black
    upright[:24, :16, 0] = upright[:24, 16:, 1] = upright[24:, :16, 2] = 255
    undo = {  # what a viewer does, from the EXIF specification
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 3),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, 1),
    }
    as_stored = upright
    for _ in range(3):  # every one of these has an order of 1, 2 or 4, so three more bring back what a camera stores
        as_stored = undo[orientation](as_stored)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = read_picture(stored(Image.fromarray(np.ascontiguousarray(as_stored)), kind, exif=exif, **options))
    assert picture.pixels.shape == upright.shape
    assert np.abs(picture.pixels.astype(int) - upright).max() < 12


def test_odd_exif_is_no_obstacle(image):
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x09", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_picture(stored(image, "JPEG", exif=exif)).pixels.shape == (40, 50, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_icc_profile_is_kept(image, mode):
    assert read_picture(stored(image.convert(mode), icc_profile=SRGB)).icc == SRGB


def test_icc_profile_survives_turning(image):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert read_picture(stored(image, "JPEG", icc_profile=SRGB, exif=exif)).icc == SRGB


def test_frames(image):
    animation = stored(image, "GIF", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    picture = read_picture(animation)
    assert picture.notes == ("only one of 3 frames is kept",)
    assert picture.pixels.shape == (40, 50, 3)


def test_arrays(photo):
    assert np.array_equal(read_picture(photo).pixels, photo)
    grey = read_picture(photo[..., 0])
    assert grey.grey and np.array_equal(grey.pixels, photo[..., :1].repeat(3, 2))
    assert read_picture(photo[..., :1]).grey
    view = read_picture(photo[::-2, ::3])
    assert view.pixels.flags.c_contiguous and np.array_equal(view.pixels, photo[::-2, ::3])
    assert read_picture(np.zeros((1, 1, 3), np.uint8)).pixels.shape == (1, 1, 3)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((4, 4, 3), np.float32),
        ((4, 4, 3), np.uint16),
        ((4, 4), bool),
        ((4, 4, 4), np.uint8),
        ((4, 4, 2), np.uint8),
        ((3, 4, 5), np.uint8),
        ((1, 4, 4, 3), np.uint8),
        ((12,), np.uint8),
        ((), np.uint8),
        ((0, 4, 3), np.uint8),
        ((4, 0), np.uint8),
    ],
)
def test_bad_arrays(shape, dtype):
    with pytest.raises(PictureError, match=r"shape \(.*\) and type .*give \(H, W, 3\) or \(H, W\) uint8"):
        read_picture(np.zeros(shape, dtype))


def test_sources(image, tmp_path):
    path = tmp_path / "ä b.png"
    image.save(path)
    with open(path, "rb") as file, Image.open(path) as lazy:
        for source in (path, str(path), file, stored(image), image, lazy):
            assert np.array_equal(read_picture(source).pixels, np.asarray(image))
    os.remove(path)  # nothing holds it


def test_unreadable_sources(image, tmp_path):
    with pytest.raises(PictureError, match="cannot be opened: No such file"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(PictureError, match="cannot be opened: "):
        read_picture(tmp_path)
    for content in (b"", b"hello", bytes(1000)):
        with pytest.raises(PictureError, match="^not a picture Pillow can read$"):
            read_picture(io.BytesIO(content))
    whole = stored(image).getvalue()
    with pytest.raises(PictureError, match="the picture cannot be read: .*truncated"):
        read_picture(io.BytesIO(whole[: len(whole) // 2]))
    with pytest.raises(PictureError, match="no pixels"):
        read_picture(Image.new("RGB", (0, 5)))


def test_too_large_for_pillow(image, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # 2000 pixels are a warning, and above twice it an error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_picture(stored(image))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(PictureError, match="the picture cannot be read: .*exceeds limit"):
        read_picture(stored(image))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "DDS", "SGI"])
def test_damage_gives_a_picture_or_a_picture_error(image, kind):
    draw = random.Random(kind)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    whole = stored(image, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {})).getvalue()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(draw.choice([1, 3, 10])):
                damaged[draw.randrange(min(len(whole), 300))] = draw.randrange(256)
            try:
                read_picture(io.BytesIO(damaged[: draw.choice([len(whole), draw.randrange(len(whole))])]))
            except PictureError as error:
                assert len(str(error).splitlines()) == 1


def test_to_pillow(photo):
    assert np.array_equal(np.asarray(to_pillow(photo)), photo)
    grey = to_pillow(photo, grey=True, icc=SRGB)
    assert grey.mode == "L" and grey.info["icc_profile"] == SRGB
    assert np.abs(np.asarray(grey) - photo.mean(2)).max() <= 0.5


@pytest.mark.parametrize("extension", [".png", ".PNG", ".webp", ".tiff", ".bmp", ".ppm"])
@pytest.mark.parametrize("grey", [False, True])
def test_lossless_outputs(photo, extension, grey):
    image = to_pillow(photo, grey=grey, icc=SRGB)
    with Image.open(io.BytesIO(picture_bytes(image, extension))) as back:
        assert np.array_equal(np.asarray(back.convert(image.mode)), np.asarray(image))
        if extension.lower() in (".png", ".webp", ".tiff"):
            assert back.info["icc_profile"] == SRGB


def test_jpeg_output_is_close(photo):
    for extension in (".jpg", ".jpeg", ".JPG"):
        with Image.open(io.BytesIO(picture_bytes(to_pillow(photo, icc=SRGB), extension))) as back:
            assert back.format == "JPEG" and back.info["icc_profile"] == SRGB
            assert np.abs(np.asarray(back).astype(float) - photo).mean() < 5


@pytest.mark.parametrize("extension, message", [("", "without an extension"), (".txt", "of type .txt"), (".cur", ".cur")])
def test_outputs_that_cannot_be(photo, extension, message):
    with pytest.raises(PictureError, match=message):
        picture_bytes(to_pillow(photo), extension)


def test_every_registered_output_works_or_is_a_picture_error(photo):
    for extension in Image.registered_extensions():
        for grey in (False, True):
            try:
                picture_bytes(to_pillow(photo, grey=grey), extension)
            except PictureError as error:
                assert len(str(error).splitlines()) == 1


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
