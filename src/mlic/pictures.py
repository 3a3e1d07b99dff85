"""Pictures in and out of files, through Pillow: what the codec takes is 8-bit RGB or grey, upright."""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import PictureError

UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PictureSource = Union[Image.Image, np.ndarray, str, os.PathLike, BinaryIO]


@dataclasses.dataclass(frozen=True)
class Picture:
    """(H, W, 3) uint8 pixels; `grey` when the three channels are one. `notes` say what was converted or lost."""

    pixels: np.ndarray
    grey: bool = False
    icc: bytes | None = None
    notes: tuple[str, ...] = ()


def read_picture(source: PictureSource) -> Picture:
    """A PIL image, an (H, W, 3) or (H, W) uint8 array, a path or a binary file -> Picture.

    Raises PictureError when it is no picture, or none this codec can code.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on odd metadata and large pictures
            if isinstance(source, Image.Image):
                return _from_pillow(source)
            with Image.open(source) as image:
                return _from_pillow(image)
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise PictureError("not a picture Pillow can read") from None
    except Exception as error:  # a damaged file can make Pillow's readers raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise PictureError(f"cannot be opened: {error.strerror}") from None
        raise PictureError(f"the picture cannot be read: {error}") from error


def _from_array(array: np.ndarray) -> Picture:
    shaped = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or shaped.ndim != 3 or shaped.shape[2] not in (1, 3) or 0 in array.shape:
        raise PictureError(
            f"an array of shape {array.shape} and type {array.dtype} is no picture; give (H, W, 3) or (H, W) uint8"
        )
    grey = shaped.shape[2] == 1
    return Picture(np.ascontiguousarray(shaped.repeat(3, 2) if grey else shaped), grey)


def _from_pillow(image: Image.Image) -> Picture:
    notes: list[str] = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"only one of {image.n_frames} frames is kept")
    image.load()
    icc = image.info.get("icc_profile")
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in UPRIGHT:  # not by ImageOps.exif_transpose, which fails where it cannot write the EXIF data anew
        image = image.transpose(UPRIGHT[orientation])
    if image.width == 0 or image.height == 0:
        raise PictureError("the picture has no pixels")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        notes.append("reduced to 8 bits per channel")
        values = np.asarray(image, np.float64)
        wide = image.mode.startswith("I;16") or values.max() > 255
        image = Image.fromarray(np.clip(np.rint(values / 257 if wide else values), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency is laid on white")
        grey = image.mode in ("1", "L", "LA", "La")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, rgba).convert("L" if grey else "RGB")
    grey = image.mode in ("1", "L")
    if image.mode not in ("1", "L", "P", "RGB"):
        notes.append(f"converted from {image.mode} to RGB")
        icc = None  # it described the other colour space
    return Picture(np.array(image.convert("RGB")), grey, icc, tuple(notes))


def to_pillow(pixels: np.ndarray, *, grey: bool = False, icc: bytes | None = None) -> Image.Image:
    """(H, W, 3) uint8 -> PIL image, mode L when grey."""
    image = Image.fromarray(np.rint(pixels.mean(2)).astype(np.uint8) if grey else pixels)
    if icc:
        image.info["icc_profile"] = icc
    return image


def picture_bytes(image: Image.Image, extension: str) -> bytes:
    """Encode to the format a file name extension (".png", ".jpg", ...) stands for. Raises PictureError."""
    kind = Image.registered_extensions().get(extension.lower())
    if kind is None or kind not in Image.SAVE:
        what = f"of type {extension}" if extension else "without an extension"
        raise PictureError(f"cannot write pictures {what}; .png always works")
    buffer = io.BytesIO()
    options = {"icc_profile": image.info["icc_profile"]} if "icc_profile" in image.info else {}
    options |= {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    try:
        image.save(buffer, kind, **options)
    except (OSError, ValueError) as error:
        raise PictureError(f"cannot be written as {kind}: {error}") from None
    return buffer.getvalue()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears complete or not at all."""
    try:
        if path.exists() and not path.is_file():  # a device or pipe: not to be replaced
            path.write_bytes(data)
            return
        real = Path(os.path.realpath(path))  # where path is a link, it stays one
        partial = real.with_name(f".{real.name[:40]}.{os.getpid()}.part")
        try:
            partial.write_bytes(data)
            os.replace(partial, real)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None
