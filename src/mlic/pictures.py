"""Pictures as the codec takes them: 8 or 16 bits, grey or RGB, upright, with alpha and metadata. Pillow reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from typing import BinaryIO, Union

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from .bands import bands
from .deep import REDUCED, fits_8_bits, read_deep, to_8_bits
from .errors import PictureError
from .metadata import convert_to_srgb, exif_of, profile_space, to_srgb, xmp_of
from .plugins import load_plugins, package_for
from .transparency import fill_transparent

UPRIGHT = {  # EXIF orientation -> what undoes it
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: values[::-1].swapaxes(0, 1),
    7: lambda values: values[::-1, ::-1].swapaxes(0, 1),
    8: lambda values: values[:, ::-1].swapaxes(0, 1),
}
OTHER_COLOURS = ("CMYK", "LAB", "YCbCr", "HSV")  # their colour profiles are of no use to RGB pixels
PictureSource = Union[Image.Image, np.ndarray, str, os.PathLike, BinaryIO, bytes]


@dataclasses.dataclass(frozen=True)
class Picture:
    """Upright pixels with what belongs to them. `notes` say what was converted or lost.

    pixels: (H, W, 3) uint8 or uint16. grey: the three channels are one. alpha: (H, W) of the same type, None: opaque.
    exif: a TIFF structure ("II*\\0..." or "MM\\0*...") whose orientation tag is 1. xmp: the packet.
    """

    pixels: np.ndarray
    grey: bool = False
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    notes: tuple[str, ...] = ()


def read_picture(source: PictureSource, *, strip: bool = False) -> Picture:
    """A PIL image, a path, a binary file or its bytes, or an array -> Picture.

    Arrays are (H, W) or (H, W, 1) grey, (H, W, 2) grey and alpha, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8, uint16
    or bool. Files of 16 bits whose values are all 8-bit ones times 257 are taken as 8 bits, arrays are not. A PIL image that
    is loaded, as it is after a first reading, has 8 bits of colour left.
    `strip` leaves out EXIF, XMP and the colour profile, after converting the pixels to sRGB where it is another one.
    Raises PictureError when it is no picture, or none this codec can code.
    """
    if isinstance(source, np.ndarray):
        return _assembled(_checked(np.asarray(source)))  # no subclass, whose methods may do other things
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    load_plugins()
    try:
        return _assembled(*_load(source, strip))
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise PictureError(f"not a picture Pillow can read{package_for(_head(source))}") from None
    except Exception as error:  # a damaged file can make Pillow's readers raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise PictureError(f"cannot be opened: {error.strerror}") from None
        raise PictureError(f"the picture cannot be read: {error}") from error


def _head(source: str | os.PathLike | BinaryIO) -> bytes:
    """The first bytes of a file, as far as they can be had."""
    with contextlib.suppress(Exception):
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                return file.read(12)
        source.seek(0)
        return source.read(12)
    return b""


def read_pixels(source: PictureSource) -> Picture:
    """`read_picture` without metadata, for measuring. Raises PictureError where pixels of 8 bits are not all there is."""
    picture = read_picture(source)
    if picture.pixels.dtype != np.uint8 or picture.alpha is not None:
        raise PictureError("only opaque pictures of 8 bits can be measured")
    return Picture(picture.pixels, picture.grey, notes=picture.notes)


def _assembled(values: np.ndarray, orientation: int = 1, others: dict | None = None) -> Picture:
    """(H, W, 1..4) values as stored, their EXIF orientation, and other fields -> Picture."""
    if orientation in UPRIGHT:
        values = UPRIGHT[orientation](values)
    channels = values.shape[2]
    grey, alpha = channels < 3, None
    if channels in (2, 4):
        alpha = np.ascontiguousarray(values[..., -1])
        if alpha.min() == np.iinfo(alpha.dtype).max:
            alpha = None
    pixels = values[..., :1].repeat(3, 2) if grey else np.ascontiguousarray(values[..., :3])
    if alpha is not None:
        pixels = fill_transparent(pixels, alpha)
    return Picture(pixels, grey, alpha, **(others or {}))


def _checked(array: np.ndarray) -> np.ndarray:
    """-> (H, W, 1..4) uint8 or uint16, or PictureError."""
    shaped = array[..., None] if array.ndim == 2 else array
    kind = array.dtype.newbyteorder("=")
    if kind not in (np.uint8, np.uint16, np.bool_) or shaped.ndim != 3 or shaped.shape[2] > 4 or 0 in array.shape:
        raise PictureError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture; give (H, W) or (H, W, 1) grey, "
            "(H, W, 2) grey and alpha, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8 (0..255), uint16 (0..65535) or bool"
        )
    return shaped * np.uint8(255) if kind == np.bool_ else shaped.astype(kind, copy=False)


def _load(source: Image.Image | str | os.PathLike | BinaryIO, strip: bool) -> tuple[np.ndarray, int, dict]:
    """-> values as stored (H, W, 1..4), orientation, metadata. When this returns, the image's memory is free again."""
    if not isinstance(source, Image.Image):
        with Image.open(source) as image:
            return _load(image, strip)
    image, notes = source, []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"only one of {image.n_frames} frames is kept")
    if image.format == "HEIF" and image.info.get("bit_depth", 8) > 8:
        notes.append(REDUCED)
    values = read_deep(image, notes)
    image.load()
    if image.width == 0 or image.height == 0:
        raise PictureError("the picture has no pixels")
    if values is None:
        values = _from_numbers(image, notes) if image.mode in ("I", "F") else _from_8_bits(image, notes)
    if values.dtype == np.uint16 and fits_8_bits(values):
        values = to_8_bits(values)
    icc = image.info.get("icc_profile") if image.mode not in OTHER_COLOURS else None
    if icc and profile_space(icc) not in ((b"RGB ", b"GRAY") if values.shape[2] < 3 else (b"RGB ",)):
        notes.append("the colour profile does not fit the picture and is left out")
        icc = None
    kept = {}
    if strip and icc:
        values = _in_srgb(values, icc, notes)
    elif not strip:
        kept = {"icc": icc, "exif": _exif(image, notes), "xmp": xmp_of(image)}
    return values, _orientation(image), kept | {"notes": tuple(notes)}


def _from_numbers(image: Image.Image, notes: list[str]) -> np.ndarray:
    """Mode I or F -> (H, W, 1): values to 255 are taken as 8 bits, larger ones and those of PGM as 16, float ones to 1 as
    shares.
    """
    stored = np.asarray(image)
    largest = np.nanmax(stored, initial=0)
    small = (1 if image.mode == "F" else 0) < largest <= 255
    kind = np.uint8 if small and (image.mode, image.format) != ("I", "PPM") else np.uint16
    most = np.iinfo(kind).max
    if image.mode == "F" and largest <= 1:
        notes.append(f"values of 0 to 1 are taken as 0 to {most}")
        stored = stored * most
    values = np.clip(np.rint(np.nan_to_num(stored, posinf=most)), 0, most).astype(kind)
    if (values != stored).any():
        notes.append(f"values are rounded to whole numbers of 0 to {most}")
    return values[..., None]


def _from_8_bits(image: Image.Image, notes: list[str]) -> np.ndarray:
    """Any other mode -> (H, W, 1..4) uint8."""
    target = ("L" if image.mode in ("1", "L", "LA", "La") else "RGB") + ("A" if image.has_transparency_data else "")
    transform = None
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        transform = to_srgb(image.info["icc_profile"], "CMYK")
    if image.mode in (*OTHER_COLOURS, "RGBX"):
        notes.append(f"converted from {image.mode} to RGB" + (" by its colour profile" if transform else ""))
    values = np.empty((image.height, image.width, len(target)), np.uint8)
    for rows in bands(image.height):
        band = image.crop((0, rows.start, image.width, rows.stop))
        band = ImageCms.applyTransform(band, transform) if transform else band.convert(target)
        values[rows] = np.asarray(band).reshape(values[rows].shape)
    return values


def _in_srgb(values: np.ndarray, icc: bytes, notes: list[str]) -> np.ndarray:
    """Values that can do without their colour profile."""
    wide = values.dtype == np.uint16
    before = to_8_bits(values) if wide else values
    after = convert_to_srgb(before, icc)
    if after is None:
        notes.append("the colour profile is damaged and left out")
    if after is None or after is before:
        return values
    notes += ["converted to sRGB", *([REDUCED] if wide else [])]
    return after


def _exif(image: Image.Image, notes: list[str]) -> bytes | None:
    try:
        return exif_of(image)
    except Exception:  # Pillow can raise anything on odd tags
        notes.append("the EXIF data is damaged and left out")
        return None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above
        return 1
