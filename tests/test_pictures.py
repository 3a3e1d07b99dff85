from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
from picture_files import SRGB, cmyk_profile, deep_png, deep_tiff, deep_values, stored
from PIL import ExifTags, Image

from mlic.errors import PictureError
from mlic.folders import picture_extensions
from mlic.metrics import psnr
from mlic.pictures import Picture, read_picture, read_pixels
from mlic.saving import picture_bytes


@pytest.fixture
def image(photo) -> Image.Image:
    return Image.fromarray(photo[:40, :50])


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


@pytest.fixture
def alpha() -> Image.Image:
    """Clear, half clear and opaque from left to right, for `image`."""
    alpha = Image.new("L", (50, 40), 255)
    alpha.paste(0, (0, 0, 10, 40))
    alpha.paste(128, (10, 0, 20, 40))
    return alpha


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "La", "RGBa"])
def test_alpha_is_kept(image, alpha, mode):
    plain = {"LA": "LA", "La": "LA", "PA": "PA"}.get(mode, "RGBA")
    image = image.quantize(64).convert("PA") if mode == "PA" else image.convert(plain)
    image.putalpha(alpha)
    picture = read_picture(image.convert(mode))
    assert picture.grey == (plain == "LA") and picture.notes == ()
    assert picture.alpha.dtype == np.uint8 and picture.alpha.flags.c_contiguous and np.array_equal(picture.alpha, alpha)
    seen = np.asarray(image.convert(mode).convert(plain).convert("RGB"))[:, 10:]  # La and RGBa lose some
    assert np.array_equal(picture.pixels[:, 10:], seen)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_unused_alpha_is_no_loss(image, mode):
    picture = read_picture(stored(image.convert(mode)))
    assert picture.notes == () and picture.alpha is None and picture.grey == (mode == "LA")
    assert np.array_equal(picture.pixels, np.asarray(image.convert(mode).convert("RGB")))


def test_palette(image):
    image = image.quantize(16)
    picture = read_picture(stored(image))
    assert not picture.grey and picture.notes == ()
    assert np.array_equal(picture.pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("table", [False, True])
def test_palette_with_transparency(image, table):
    image = image.quantize(16)
    index = image.getpixel((0, 0))
    levels = [255] * 16
    levels[index] = 0
    if table:
        levels[image.getpixel((30, 30))] = 77
    picture = read_picture(stored(image, transparency=bytes(levels) if table else index))
    assert picture.notes == () and not picture.grey
    assert np.array_equal(picture.alpha, np.array(levels)[np.asarray(image)]) and (77 in picture.alpha) == table
    seen = np.asarray(image) != index
    assert np.array_equal(picture.pixels[seen], np.asarray(image.convert("RGB"))[seen])


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_transparent_colour(image, mode):
    image = image.convert(mode)
    colour = image.getpixel((0, 0))
    picture = read_picture(stored(image, transparency=1 if colour == 255 and mode == "1" else colour))
    clear = np.asarray(image.convert("RGB") if mode == "RGB" else image.convert("L").convert("RGB"))
    clear = (clear == clear[0, 0]).all(2)
    assert picture.grey == (mode != "RGB") and picture.notes == () and not clear.all()
    assert np.array_equal(picture.alpha, np.where(clear, 0, 255))


@pytest.mark.parametrize("profile", [None, SRGB, b"no profile"])
def test_cmyk_without_a_fitting_profile(image, profile):
    image = image.convert("CMYK")
    picture = read_picture(stored(image, "TIFF", **({"icc_profile": profile} if profile else {})))
    assert picture.notes == ("converted from CMYK to RGB",)
    assert picture.icc is None  # it described the other colour space
    assert np.array_equal(picture.pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_by_its_profile(kind):
    """The profile's cyan prints green."""
    image = Image.new("CMYK", (20, 300), (255, 0, 0, 0))
    image.paste((0, 0, 0, 0), (0, 150, 20, 300))
    picture = read_picture(stored(image, kind, icc_profile=cmyk_profile()))
    assert picture.notes == ("converted from CMYK to RGB by its colour profile",) and picture.icc is None
    red, green, blue = picture.pixels[10, 10].astype(int)
    assert green > 100 > 30 > max(red, blue) and (picture.pixels[280] > 250).all()


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX"])
def test_other_colour_spaces(image, mode):
    image = image.convert(mode) if mode != "LAB" else Image.new(mode, (5, 4))
    picture = read_picture(image)
    assert picture.notes == (f"converted from {mode} to RGB",)
    assert np.array_equal(picture.pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_values(dtype):
    values = np.arange(256).reshape(16, 16)
    picture = read_picture(Image.fromarray(values.astype(dtype)))
    assert picture.grey and picture.notes == () and picture.pixels.dtype == np.uint8
    assert np.array_equal(picture.pixels[..., 0], values)
    picture = read_picture(Image.fromarray((values * 200).astype(dtype)))
    assert picture.grey and picture.notes == () and picture.pixels.dtype == np.uint16
    assert np.array_equal(picture.pixels[..., 0], values * 200)
    picture = read_picture(Image.fromarray(np.array([[-5, 3, 100]], dtype)))
    assert picture.pixels[0, :, 0].tolist() == [0, 3, 100]
    assert picture.notes == ("values are rounded to whole numbers of 0 to 255",)
    picture = read_picture(Image.fromarray(np.array([[-5, 3, 70000]], dtype)))
    assert picture.pixels[0, :, 0].tolist() == [0, 3, 65535]
    assert picture.notes == ("values are rounded to whole numbers of 0 to 65535",)


def test_float_values_to_1_are_shares():
    picture = read_picture(Image.fromarray(np.array([[0, 0.25, 0.6]], np.float32)))
    assert picture.pixels[0, :, 0].tolist() == [0, 16384, 39321]
    assert picture.notes[0] == "values of 0 to 1 are taken as 0 to 65535"


def test_float_tiff_with_nan():
    values = np.full((4, 4), 7, np.float32)
    values[0, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read_picture(stored(Image.fromarray(values), "TIFF"))
    assert picture.pixels[1, 1, 0] == 7


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
    bits = read_picture(photo[..., 0] > 100)
    assert bits.grey and np.array_equal(bits.pixels[..., 1], (photo[..., 0] > 100) * 255)


@pytest.mark.parametrize("dtype", ["uint8", "<u2", ">u2"])
def test_arrays_with_alpha(photo, dtype):
    photo = photo.astype(dtype) | 1
    for channels, values in ((2, photo[..., :2]), (4, np.dstack([photo, photo[..., 0]]))):
        picture = read_picture(values)
        assert picture.grey == (channels == 2)
        assert picture.pixels.dtype == picture.alpha.dtype == np.dtype(dtype).newbyteorder("=")
        assert np.array_equal(picture.pixels, values[..., [0, 0, 0] if channels == 2 else [0, 1, 2]])
        assert np.array_equal(picture.alpha, values[..., -1])
        values[..., -1] = np.iinfo(dtype).max
        assert read_picture(values).alpha is None


def test_arrays_of_16_bits_stay_so():
    for values in (np.zeros((4, 5, 3), np.uint16), np.full((4, 5), 257, np.uint16)):
        picture = read_picture(values)
        assert picture.pixels.dtype == np.uint16 and (picture.pixels == values.max()).all()


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((4, 4, 3), np.float32),
        ((4, 4, 3), np.int16),
        ((4, 4), np.int64),
        ((3, 4, 5), np.uint8),
        ((1, 4, 4, 3), np.uint8),
        ((12,), np.uint8),
        ((), np.uint8),
        ((0, 4, 3), np.uint8),
        ((4, 4, 0), np.uint8),
        ((4, 0), np.uint8),
    ],
)
def test_bad_arrays(shape, dtype):
    with pytest.raises(PictureError, match=rf"shape \(.*\) and type {np.dtype(dtype)} .*give \(H, W\).*RGBA, of uint8"):
        read_picture(np.zeros(shape, dtype))


def test_sources(image, tmp_path):
    path = tmp_path / "ä b.png"
    image.save(path)
    with open(path, "rb") as file, Image.open(path) as lazy:
        for source in (path, str(path), file, stored(image), image, lazy):
            assert np.array_equal(read_picture(source).pixels, np.asarray(image))
    os.remove(path)  # nothing holds it


def test_reading_on_many_threads_leaves_the_process_its_warnings(image):
    data, before = stored(image).getvalue(), list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read_picture(io.BytesIO(data)), range(60)))
    assert warnings.filters == before


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


@pytest.mark.parametrize(
    "module, package, extension, head",
    [
        ("pillow_heif", "pillow-heif", "heic", b"\0\0\0\x18ftypheic\0\0"),
        ("pillow_jxl", "pillow-jxl-plugin", "jxl", b"\0\0\0\x0cJXL \r\n\x87\n"),
    ],
)
def test_formats_of_plugins(photo, tmp_path, module, package, extension, head):
    """With them, they are pictures as any; without, what is missing is named."""
    if find_spec(module):
        written = picture_bytes(Picture(photo), f".{extension}")
        assert f".{extension}" in picture_extensions() and psnr(read_picture(written).pixels, photo) > 25
        return
    (tmp_path / "a").write_bytes(head)
    for source in (head, tmp_path / "a", io.BytesIO(head)):
        with pytest.raises(PictureError, match=f"^not a picture Pillow can read; .* needs the package {package}$"):
            read_picture(source)


def test_too_large_for_pillow(image, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # 2000 pixels are a warning, and above twice it an error
    with pytest.warns(Image.DecompressionBombWarning):
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


@pytest.mark.parametrize("make", [deep_png, deep_tiff])
def test_damaged_files_of_16_bits(photo, make):
    draw, whole = random.Random(0), make(deep_values(photo[:40, :50], 3)).getvalue()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 3, 10])):
            damaged[draw.randrange(300)] = draw.randrange(256)
        try:
            read_picture(io.BytesIO(damaged[: draw.choice([len(whole), draw.randrange(len(whole))])]))
        except PictureError as error:
            assert len(str(error).splitlines()) == 1
    for cut in (100, len(whole) // 2):
        with pytest.raises(PictureError):
            read_picture(io.BytesIO(whole[:cut]))


MEASURE = """
import sys
from mlic.pictures import read_picture, read_pixels
from mlic.saving import picture_bytes
def peak(name): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
read_picture(sys.argv[1] + "small.png")  # loads Pillow's plugins
before = peak("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
picture = read_picture(sys.argv[1] + "large.png")
print(peak("VmHWM") - before)
picture_bytes(picture, ".png")
print(peak("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory as Linux tells it")
def test_memory(photo, tmp_path):
    """100 megapixels of 8-bit RGB are to fit into 1 GiB, so 10.7 bytes per pixel."""
    Image.fromarray(photo).save(tmp_path / "small.png")
    Image.fromarray(np.tile(photo, (40, 40, 1))).save(tmp_path / "large.png", compress_level=1)
    run = subprocess.run([sys.executable, "-c", MEASURE, f"{tmp_path}/"], capture_output=True, text=True, check=True)
    reading, writing = (int(line) / photo[..., 0].size / 1600 for line in run.stdout.split())
    assert 3 < reading < 10.7 and reading <= writing < 10.7


def test_read_pixels_refuses_what_cannot_be_measured(photo):
    assert np.array_equal(read_pixels(photo).pixels, photo)
    for other in (photo.astype(np.uint16) * 200, np.dstack([photo, photo[..., :1]])):
        with pytest.raises(PictureError, match="opaque pictures of 8 bits"):
            read_pixels(other)
