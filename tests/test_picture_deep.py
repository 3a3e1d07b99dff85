"""Pictures of 16 bits per channel."""

from __future__ import annotations

import io

import numpy as np
import pytest
from picture_files import SRGB, SWAPPED, deep_png, deep_tiff, deep_values, stored
from PIL import ExifTags, Image

from mlic.pictures import Picture, read_picture
from mlic.saving import picture_bytes

REDUCED = "reduced to 8 bits per channel"


def check(picture: Picture, values: np.ndarray) -> None:
    channels = values.shape[2]
    assert picture.pixels.dtype == np.uint16 and picture.notes == () and picture.grey == (channels < 3)
    assert np.array_equal(picture.pixels, values[..., [0, 0, 0] if channels < 3 else [0, 1, 2]])
    if channels in (2, 4):
        assert picture.alpha.dtype == np.uint16 and np.array_equal(picture.alpha, values[..., -1])
    else:
        assert picture.alpha is None


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png(photo, channels, tmp_path):
    values = deep_values(np.tile(photo, (4, 1, 1)), channels)  # more rows than are handled at once
    file = deep_png(values)
    check(read_picture(file), values)
    path = tmp_path / "x.png"
    path.write_bytes(file.getvalue())
    check(read_picture(path), values)
    with open(path, "rb") as handle, Image.open(path) as lazy:
        check(read_picture(handle), values)
        check(read_picture(lazy), values)
        assert np.array_equal(lazy, Image.open(file))  # and is as good as before


def test_the_frame_an_image_is_at(photo):
    frames = [deep_values(pixels, 1)[..., 0] for pixels in (photo, photo[::-1])]
    pages = stored(Image.fromarray(frames[0]), "TIFF", save_all=True, append_images=[Image.fromarray(frames[1])])
    image = Image.open(pages)
    image.seek(1)
    assert np.array_equal(read_picture(image).pixels[..., 0], frames[1])

    frames = [deep_values(pixels, 3) for pixels in (photo, photo[::-1, 9:])]
    first = bytearray(deep_tiff(frames[0]).getvalue())
    second = deep_tiff(frames[1], start=len(first)).getvalue()
    after = 10 + 12 * first[8]  # where the first page says where the second one's table is
    first[after : after + 4] = (len(first) + 8).to_bytes(4, "little")
    with Image.open(io.BytesIO(first + second)) as image:
        for at in (0, 1):
            image.seek(at)
            picture = read_picture(image)
            assert np.array_equal(picture.pixels, frames[at]) and picture.notes == ("only one of 2 frames is kept",)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("how", [{}, {"deflate": True}, {"deflate": True, "predictor": True}, {"planar": True}])
def test_tiff(photo, order, channels, how, tmp_path):
    values = deep_values(photo, channels)
    file = deep_tiff(values, order=order, **how)
    check(read_picture(file), values)
    path = tmp_path / "x.tif"
    path.write_bytes(file.getvalue())
    check(read_picture(path), values)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("deflate", [False, True])
def test_turned_tiff(photo, channels, deflate):
    values = deep_values(np.tile(photo, (1, 4, 1)), channels)
    check(read_picture(deep_tiff(values, deflate=deflate, turned=6)), np.rot90(values, 3))


def test_lzw_tiff(photo):
    values = deep_values(photo, 1)
    check(read_picture(stored(Image.fromarray(values[..., 0]), "TIFF", compression="tiff_lzw")), values)


@pytest.mark.parametrize("channels", [3, 4])
def test_compressed_planes_are_reduced_and_it_is_said(photo, channels):
    values = deep_values(photo, channels)
    picture = read_picture(deep_tiff(values, deflate=True, planar=True))
    assert picture.notes == (REDUCED,) and picture.pixels.dtype == np.uint8
    assert np.abs(picture.pixels.astype(int) - values[..., :3] / 257)[values[..., -1] > 255].max() <= 1


@pytest.mark.parametrize("channels, kind", [(1, b"P5"), (3, b"P6")])
def test_ppm(photo, channels, kind):
    values = deep_values(photo, channels)
    check(read_picture(io.BytesIO(kind + b"\n96 80\n65535\n" + values.astype(">u2").tobytes())), values)


def test_dark_pgm(photo):
    """Pillow scales PGM to 16 bits; values below 256 are dark, not those of 8 bits."""
    dark = np.minimum(photo[..., 1], 200).astype(np.uint16)
    read = read_picture(io.BytesIO(b"P5\n96 80\n65535\n" + dark.astype(">u2").tobytes())).pixels
    assert read.dtype == np.uint16 and np.array_equal(read[..., 0], dark)
    written = picture_bytes(Picture(read, grey=True), ".pgm")
    assert np.array_equal(read_picture(io.BytesIO(written)).pixels, read)


def test_reduction_is_said(photo):
    picture = read_picture(io.BytesIO(b"P3\n2 1\n65535\n40000 300 7 1 2 3\n"))
    assert picture.notes == (REDUCED,) and picture.pixels[0, 0, 0] == 156
    assert read_picture(io.BytesIO(b"P3\n2 1\n255\n200 30 7 1 2 3\n")).notes == ()
    picture = read_picture(io.BytesIO(b"P6\n96 80\n1023\n" + (photo.astype(np.uint16) * 4).astype(">u2").tobytes()))
    assert picture.notes == (REDUCED,) and np.abs(picture.pixels.astype(int) - photo).max() <= 2
    picture = read_picture(io.BytesIO(b"P6\n96 80\n255\n" + photo.tobytes()))
    assert picture.notes == () and np.array_equal(picture.pixels, photo)
    cmyk = deep_tiff(deep_values(photo, 4)).getvalue()
    cmyk = cmyk.replace(b"\x06\x01\x04\0\x01\0\0\0\x02", b"\x06\x01\x04\0\x01\0\0\0\x05")  # the colour space
    cmyk = cmyk.replace(b"\x52\x01\x04\0\x01\0\0\0\x02", b"\x52\x01\x04\0\0\0\0\0\0")  # no alpha
    assert REDUCED in read_picture(io.BytesIO(cmyk)).notes


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_8_bit_content_becomes_8_bits(photo, channels):
    values = deep_values(photo, channels) // 256
    picture = read_picture(deep_png(values * 257))
    assert picture.pixels.dtype == np.uint8 and picture.notes == ()
    seen = values[..., -1] > 0 if channels in (2, 4) else slice(None)
    assert np.array_equal(picture.pixels[seen], values[..., [0, 0, 0] if channels < 3 else [0, 1, 2]][seen])
    almost = values * 257
    almost[-1, -1, -1] ^= 1
    assert read_picture(deep_png(almost)).pixels.dtype == np.uint16


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour(photo, channels):
    values = deep_values(photo, channels)
    values[1, 1] = values[3, 4] = values[0, 0]
    values[5, 5] = values[0, 0] ^ 1  # differs in the low byte only
    picture = read_picture(deep_png(values, (b"tRNS", values[0, 0].astype(">u2").tobytes())))
    clear = (values == values[0, 0]).all(2)
    assert clear[3, 4] and not clear[5, 5]
    assert np.array_equal(picture.alpha, np.where(clear, 0, 65535)) and picture.alpha.dtype == np.uint16
    assert np.array_equal(picture.pixels[~clear], np.broadcast_to(values, (80, 96, 3))[~clear])


def test_opaque_alpha_is_none(photo):
    values = deep_values(photo, 4)
    values[..., 3] = 65535
    check(read_picture(deep_png(values)), values[..., :3])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_turning_and_metadata(photo, channels):
    values = deep_values(photo, channels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Cam"
    profile = png_chunk(stored(Image.fromarray(photo), icc_profile=SRGB), b"iCCP")
    for after in (False, True):  # EXIF data may also come after the pixels
        file = deep_png(values, (b"iCCP", profile), (b"eXIf", exif.tobytes()[6:])).getvalue()
        if after:
            start, pixels, end = file.index(b"eXIf") - 4, file.index(b"IDAT") - 4, len(file) - 12
            file = file[:start] + file[pixels:end] + file[start:pixels] + file[end:]
        picture = read_picture(io.BytesIO(file))
        check(picture, np.rot90(values, 3))
        assert picture.icc == SRGB and b"Cam" in picture.exif


def test_stripping_converts_at_8_bits(photo):
    values = deep_values(photo, 3)
    profile = png_chunk(stored(Image.fromarray(photo), icc_profile=SWAPPED), b"iCCP")
    picture = read_picture(deep_png(values, (b"iCCP", profile)), strip=True)
    assert picture.notes == ("converted to sRGB", REDUCED) and picture.icc is None
    assert np.abs(picture.pixels.astype(int) - values[..., [1, 0, 2]] // 256).max() <= 3
    profile = png_chunk(stored(Image.fromarray(photo), icc_profile=SRGB), b"iCCP")
    check(read_picture(deep_png(values, (b"iCCP", profile)), strip=True), values)


def png_chunk(file: io.BytesIO, kind: bytes) -> bytes:
    data = file.getvalue()
    place = data.index(kind)
    return data[place + 4 : place + 4 + int.from_bytes(data[place - 4 : place], "big")]


def test_dark_pictures_stay_dark():
    picture = read_picture(stored(Image.fromarray(np.full((4, 4), 200, np.uint16))))
    assert (picture.pixels == 200).all() and picture.pixels.dtype == np.uint16
