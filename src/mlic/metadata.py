"""Metadata of pictures: EXIF and XMP of a picture that was turned upright, and colour profiles."""

from __future__ import annotations

import io
import re
import struct

import numpy as np
from PIL import ExifTags, Image, ImageCms

from .bands import bands

Tag = ExifTags.Base
# what of a TIFF file's own tags is about the picture, not about how the file holds it
DESCRIPTIVE = {
    Tag.ImageDescription, Tag.Make, Tag.Model, Tag.XResolution, Tag.YResolution, Tag.ResolutionUnit, Tag.Software,
    Tag.DateTime, Tag.Artist, Tag.HostComputer, Tag.Copyright, Tag.ExifOffset, Tag.GPSInfo, Tag.Rating, Tag.RatingPercent,
    Tag.XPTitle, Tag.XPComment, Tag.XPAuthor, Tag.XPKeywords, Tag.XPSubject,
}  # fmt: skip


def exif_of(image: Image.Image) -> bytes | None:
    """The EXIF data of an image as a TIFF structure, orientation 1. Damaged data can raise anything."""
    stored = image.info.get("exif")
    if not isinstance(stored, bytes):  # TIFF files hold the tags themselves, some PNG files hold them as text
        tags = descriptive_tags(image)
        return tags.tobytes().removeprefix(b"Exif\0\0") if len(tags) else None
    stored = stored.removeprefix(b"Exif\0\0")
    return upright_exif(stored) if stored else None


def descriptive_tags(image: Image.Image) -> Image.Exif:
    """A copy of an image's tags without those that only one file needs."""
    tags = Image.Exif()
    tags.load(image.getexif().tobytes())
    for tag in set(tags) - DESCRIPTIVE:
        del tags[tag]
    return tags


def upright_exif(exif: bytes) -> bytes:
    """A TIFF structure with its orientation set to 1, all else as it is. Raises ValueError where it is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        raise ValueError("no TIFF structure")
    changed = bytearray(exif)
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, _kind, _count, _value = struct.unpack_from(f"{order}HHII", exif, place)
            if tag == Tag.Orientation:
                struct.pack_into(f"{order}HHIHH", changed, place, tag, 3, 1, 1, 0)
    except struct.error:
        raise ValueError("the tags end beyond the data") from None
    return bytes(changed)


def xmp_of(image: Image.Image) -> bytes | None:
    """The XMP packet of an image, its orientation set to 1."""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    if not isinstance(xmp, bytes) or not xmp:
        return None
    return re.sub(rb"""(tiff:Orientation(?:>|\s*=\s*["'])\s*)[2-8]""", rb"\g<1>1", xmp)


def profile_space(icc: bytes) -> bytes:
    """What an ICC profile describes: b"RGB ", b"GRAY", b"CMYK", ..."""
    return icc[16:20] if icc[36:40] == b"acsp" else b""


def to_srgb(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts images of a mode to sRGB; None where the profile does not allow it."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def convert_to_srgb(values: np.ndarray, icc: bytes) -> np.ndarray | None:
    """(H, W, 1..4) uint8 -> the same in sRGB, alpha kept; `values` itself where nothing changes; None: impossible."""
    colours = 1 if values.shape[2] < 3 else 3
    mode = "L" if profile_space(icc) == b"GRAY" else "RGB"
    transform = to_srgb(icc, mode)
    if transform is None:
        return None

    def convert(part: np.ndarray) -> np.ndarray:
        image = Image.fromarray(np.ascontiguousarray(part.squeeze(2) if colours == 1 else part))
        return np.asarray(ImageCms.applyTransform(image.convert(mode), transform))[..., :colours]

    levels = np.arange(0, 256, 17, dtype=np.uint8)
    samples = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(16, 256, 3)[..., :colours]
    if np.abs(convert(samples).astype(int) - samples).max() <= 1:  # sRGB by whatever name
        return values
    converted = values.copy()
    for rows in bands(len(values)):
        converted[rows, :, :colours] = convert(values[rows, :, :colours])
    return converted
