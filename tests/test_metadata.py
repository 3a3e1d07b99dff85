"""EXIF, XMP and colour profiles of pictures that are read."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from picture_files import SRGB, SWAPPED, cmyk_profile, grey_profile, stored
from PIL import ExifTags, Image, PngImagePlugin

from mlic.metadata import upright_exif
from mlic.pictures import read_picture

Tag = ExifTags.Base
XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6" tiff:Make="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.fixture
def image(photo) -> Image.Image:
    return Image.fromarray(photo[:40, :50])


def exif_data(orientation: int | None) -> bytes:
    exif = Image.Exif()
    exif[Tag.Make], exif[Tag.Copyright] = "Cam", "me"
    exif.get_ifd(ExifTags.IFD.Exif)[Tag.ExposureTime] = 0.25
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    if orientation:
        exif[Tag.Orientation] = orientation
    return exif.tobytes()


def with_xmp(image: Image.Image, kind: str, xmp: bytes) -> io.BytesIO:
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        return stored(image, kind, pnginfo=info)
    return stored(image, kind, **({"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}))


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
    exif[Tag.Orientation] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    picture = read_picture(stored(Image.fromarray(np.ascontiguousarray(as_stored)), kind, exif=exif, **options))
    assert picture.pixels.shape == upright.shape
    assert np.abs(picture.pixels.astype(int) - upright).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_exif_is_kept_upright(image, kind, orientation):
    picture = read_picture(stored(image, kind, exif=exif_data(orientation)))
    assert picture.exif[:4] in (b"II*\0", b"MM\0*") and picture.notes == ()
    exif = Image.Exif()
    exif.load(picture.exif)
    assert exif.get(Tag.Orientation, 1) == 1
    assert exif[Tag.Make] == "Cam" and exif[Tag.Copyright] == "me"
    assert exif.get_ifd(ExifTags.IFD.Exif)[Tag.ExposureTime] == 0.25
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    assert not {Tag.ImageWidth, Tag.StripOffsets, Tag.Compression, Tag.BitsPerSample} & set(exif)


def test_exif_of_a_tiff_file_on_disk(image, tmp_path):
    image.save(tmp_path / "x.tif", exif=exif_data(6))
    picture = read_picture(tmp_path / "x.tif")
    assert b"Cam" in picture.exif and picture.pixels.shape == (50, 40, 3)
    image.save(tmp_path / "plain.tif")
    assert read_picture(tmp_path / "plain.tif").exif is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_only_the_orientation_is_changed(image, order):
    """Whatever else is in EXIF data, maker notes with places of their own included, stays byte by byte."""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    tags = [struct.pack(f"{order}HHIHH", 0x112, 3, 1, value, 0) for value in (6, 1)]
    note = struct.pack(f"{order}HHII", 0x927C, 7, 9, 38)
    before, after = (start + struct.pack(f"{order}H", 2) + tag + note + bytes(4) + b"odd bytes" for tag in tags)
    assert upright_exif(before) == after == upright_exif(after)
    assert read_picture(stored(image, "JPEG", exif=b"Exif\0\0" + before)).exif == after


@pytest.mark.parametrize("exif", [b"MM\0*\0\0\0\x08\0\x09", b"II*\0\xff\xff\0\0", b"II*\0", b"what is this"])
def test_damaged_exif_is_left_out(image, exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's
            picture = read_picture(stored(image, kind, exif=b"Exif\0\0" + exif))
        assert picture.exif is None and picture.notes == ("the EXIF data is damaged and left out",)
        assert picture.pixels.shape == (40, 50, 3)


def test_odd_exif_is_no_obstacle(image):
    odd_orientation = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"
    picture = read_picture(stored(image, "JPEG", exif=b"Exif\0\0" + odd_orientation))
    assert picture.pixels.shape == (40, 50, 3) and picture.exif == odd_orientation.replace(b"\x63", b"\x01")
    picture = read_picture(stored(image, "JPEG", exif=b"Exif\0\0"))
    assert picture.exif is None and picture.notes == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_xmp_is_kept(image, kind):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a>\xc3\xa4</a></x:xmpmeta>'
    assert read_picture(with_xmp(image, kind, xmp)).xmp == xmp
    assert read_picture(stored(image, kind)).xmp is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_orientation_told_by_xmp_alone(image, kind):
    picture = read_picture(with_xmp(image, kind, XMP))
    assert picture.pixels.shape == (50, 40, 3)
    if kind == "TIFF":  # Pillow turns TIFF pictures itself and takes the orientation out
        assert b"Orientation" not in picture.xmp and b'tiff:Make="6"' in picture.xmp
        return
    assert picture.xmp == XMP.replace(b'Orientation="6"', b'Orientation="1"')
    element = b"><tiff:Orientation>6</tiff:Orientation></rdf:Description"
    element = XMP.replace(b'tiff:Orientation="6" tiff:Make="6"/', element)
    picture = read_picture(with_xmp(image, kind, element))
    assert picture.pixels.shape == (50, 40, 3) and b"tiff:Orientation>1<" in picture.xmp


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
def test_icc_profile_is_kept(image, mode):
    assert read_picture(stored(image.convert(mode), icc_profile=SRGB)).icc == SRGB
    assert read_picture(stored(image.convert("L"), icc_profile=grey_profile(1))).icc == grey_profile(1)


@pytest.mark.parametrize("profile", [b"no profile", cmyk_profile(), grey_profile(2)])
def test_a_profile_that_does_not_fit_is_left_out(image, profile):
    picture = read_picture(stored(image, icc_profile=profile))
    assert picture.icc is None and picture.notes == ("the colour profile does not fit the picture and is left out",)
    assert np.array_equal(picture.pixels, np.asarray(image))


def test_icc_profile_survives_turning(image):
    assert read_picture(stored(image, "JPEG", icc_profile=SRGB, exif=exif_data(6))).icc == SRGB


def test_stripping(image):
    with_all = stored(image, "WEBP", lossless=True, icc_profile=SRGB, exif=exif_data(6), xmp=XMP)
    assert all((picture := read_picture(with_all)).__dict__[field] for field in ("icc", "exif", "xmp"))
    with_all.seek(0)
    picture = read_picture(with_all, strip=True)
    assert (picture.icc, picture.exif, picture.xmp, picture.notes) == (None, None, None, ())
    assert np.array_equal(picture.pixels, np.rot90(image, 3))  # sRGB, so nothing is converted; and upright


def test_stripping_converts_to_srgb(image):
    large = Image.fromarray(np.tile(np.asarray(image), (8, 1, 1)))  # more rows than are converted at once
    for alpha in (False, True):
        if alpha:
            large.putalpha(large.getchannel("B"))
        picture = read_picture(stored(large, icc_profile=SWAPPED), strip=True)
        assert picture.icc is None and picture.notes == ("converted to sRGB",)
        assert np.abs(picture.pixels.astype(int) - np.asarray(large)[..., [1, 0, 2]]).max() <= 2
        assert not alpha or np.array_equal(picture.alpha, large.getchannel("A"))
        kept = read_picture(stored(large, icc_profile=SWAPPED))
        assert kept.icc == SWAPPED and np.array_equal(kept.pixels, np.asarray(large)[..., :3])


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_stripping_converts_grey(image, mode):
    image = image.convert(mode)
    picture = read_picture(stored(image, icc_profile=grey_profile(1)), strip=True)  # linear light
    light = np.asarray(image.convert("L")) / 255
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert picture.grey and picture.notes == ("converted to sRGB",)
    assert np.abs(picture.pixels[..., 0] - expected).max() <= 1.5
    picture = read_picture(stored(image, icc_profile=SRGB), strip=True)
    assert picture.notes == () and np.array_equal(picture.pixels[..., 0], image.convert("L"))


def test_stripping_a_profile_that_cannot_be_used(image):
    broken = SRGB[:140] + bytes(len(SRGB) - 140)
    picture = read_picture(stored(image, icc_profile=broken), strip=True)
    assert picture.notes == ("the colour profile is damaged and left out",) and picture.icc is None
    assert np.array_equal(picture.pixels, np.asarray(image))
