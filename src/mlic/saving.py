"""Pictures to PIL images and to the bytes of picture files; files that appear complete or not at all."""

from __future__ import annotations

import dataclasses
import io
import os
import secrets
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from .bands import bands
from .deep import REDUCED, to_8_bits
from .errors import PictureError
from .metadata import descriptive_tags
from .plugins import load_plugins
from .png16 import png16
from .transparency import on_white

if TYPE_CHECKING:
    from .pictures import Picture

# what Pillow's writers, and its plugins' for HEIF and JPEG XL, keep
ALPHA = {"PNG", "TIFF", "WEBP", "AVIF", "JPEG2000", "TGA", "GIF", "ICO", "ICNS", "DDS", "SGI", "HEIF", "JXL"}
DEEP_GREY = {"PNG", "TIFF", "JPEG2000", "PPM"}
METADATA = {"PNG", "TIFF", "JPEG", "WEBP", "AVIF", "HEIF", "JXL"}
METADATA_NAMES = {"icc": "colour profile", "exif": "EXIF data", "xmp": "XMP data"}
OPTIONS = {  # runs are all that photographs need of deflate: the same size in a quarter of the time
    "PNG": {"compress_type": zlib.Z_RLE},
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True},
}
JPEG_MOST = 65000  # bytes of EXIF or XMP data


def to_pillow(picture: Picture) -> Image.Image:
    """Mode L or RGB, with alpha LA or RGBA; 16-bit grey without alpha is I;16, other 16 bits are reduced to 8.

    `info` has icc_profile, exif and xmp, as with images Pillow opens.
    """
    pixels, alpha = picture.pixels, picture.alpha
    colours = grey_of(pixels) if picture.grey else pixels
    if colours.dtype == np.uint16 and not (picture.grey and alpha is None):
        colours, alpha = to_8_bits(colours), None if alpha is None else to_8_bits(alpha)
    image = Image.fromarray(colours)
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    exif = picture.exif and b"Exif\0\0" + picture.exif
    for key, value in (("icc_profile", picture.icc), ("exif", exif), ("xmp", picture.xmp)):
        if value:
            image.info[key] = value
    return image


def grey_of(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> the mean of the channels, (H, W)."""
    grey = np.empty(pixels.shape[:2], pixels.dtype)
    for rows in bands(len(pixels)):
        grey[rows] = (pixels[rows].sum(2, dtype=np.uint32) + 1) // 3
    return grey


def format_of(extension: str) -> str:
    """Pillow's name of the format that a file name extension stands for. Raises PictureError where it writes none."""
    load_plugins()
    kind = Image.registered_extensions().get(extension.lower())
    if kind is None or kind not in Image.SAVE:
        what = f"of type {extension}" if extension else "without an extension"
        raise PictureError(f"cannot write pictures {what}; .png always works")
    return kind


def picture_bytes(picture: Picture, extension: str) -> bytes:
    """Encode to the format a file name extension (".png", ".jpg", ...) stands for.

    PNG keeps everything. What another format cannot hold (alpha, 16 bits, metadata) is left out with a UserWarning;
    transparency is then laid on white. Raises PictureError.
    """
    kind = format_of(extension)
    if kind == "PNG" and picture.pixels.dtype == np.uint16:
        return _deep_png(picture)
    picture = _for_format(picture, kind)
    image = to_pillow(picture)
    options = dict(OPTIONS.get(kind, {}))
    options |= {key: value for key, value in image.info.items() if key in ("icc_profile", "exif", "xmp")}
    if "xmp" in options and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add(*_png_xmp(options.pop("xmp")))
    buffer = io.BytesIO()
    try:
        if kind == "TIFF":
            options["exif"] = descriptive_tags(image)
            if "xmp" in options:
                options["exif"][ExifTags.Base.XMLPacket] = options.pop("xmp")
        image.save(buffer, kind, **options)
    except MemoryError:
        raise
    except Exception as error:  # odd EXIF data can make Pillow's writers raise anything
        if picture.exif:
            data = picture_bytes(dataclasses.replace(picture, exif=None), extension)
            warnings.warn(f"{kind}: damaged EXIF data left out; .png keeps everything", stacklevel=2)
            return data
        raise PictureError(f"cannot be written as {kind}: {error}") from None
    return buffer.getvalue()


def _for_format(picture: Picture, kind: str) -> Picture:
    """What a format of Pillow's can hold of a picture; warns of the rest."""
    changes, lost = {}, []
    pixels, alpha = picture.pixels, picture.alpha
    if alpha is not None and kind not in ALPHA:
        lost.append("transparency is laid on white")
        pixels, alpha = on_white(pixels, alpha), None
    if pixels.dtype == np.uint16 and not (picture.grey and alpha is None and kind in DEEP_GREY):
        lost.append(REDUCED)
        pixels, alpha = to_8_bits(pixels), None if alpha is None else to_8_bits(alpha)
    for field, name in METADATA_NAMES.items():
        data = getattr(picture, field)
        if data and (kind not in METADATA or (kind == "JPEG" and field != "icc" and len(data) > JPEG_MOST)):
            changes[field] = None
            lost.append(f"{name} left out")
    if lost:
        warnings.warn(f"{kind}: {', '.join(lost)}; .png keeps everything", stacklevel=3)
    return dataclasses.replace(picture, pixels=pixels, alpha=alpha, **changes)


def array_of(picture: Picture) -> np.ndarray:
    """(H, W, C): C is 1 for grey, 3 for RGB, and one more with alpha."""
    pixels = grey_of(picture.pixels)[..., None] if picture.grey else picture.pixels
    return pixels if picture.alpha is None else np.dstack([pixels, picture.alpha])


def _deep_png(picture: Picture) -> bytes:
    chunks = []
    if picture.icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.icc)))
    if picture.exif:
        chunks.append((b"eXIf", picture.exif))
    if picture.xmp:
        chunks.append(_png_xmp(picture.xmp))
    return png16(array_of(picture), chunks)


def _png_xmp(xmp: bytes) -> tuple[bytes, bytes]:
    return b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears complete or not at all."""
    try:
        if path.exists() and not path.is_file():  # a device or pipe: not to be replaced
            path.write_bytes(data)
            return
        real = Path(os.path.realpath(path))  # where path is a link, it stays one
        partial = real.with_name(f".{real.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            partial.write_bytes(data)
            os.replace(partial, real)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None
