"""The alpha channel in a file: lossless, as a PNG of its own."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from .errors import DamagedFile


def alpha_bytes(alpha: np.ndarray) -> bytes:
    """(H, W) uint8 or uint16 -> a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(alpha).save(buffer, "PNG", optimize=alpha.size < 1 << 24)
    return buffer.getvalue()


def alpha_from_bytes(data: bytes, width: int, height: int, depth: int) -> np.ndarray:
    """-> (height, width) uint8, or uint16 for depth 16. Raises DamagedFile when the PNG is not that."""
    try:
        if data[24:26] != bytes([depth, 0]):  # in its IHDR
            raise DamagedFile(f"alpha is no grey PNG of {depth} bits")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != (width, height):
                raise DamagedFile(f"alpha is {image.size[0]}x{image.size[1]}")
            return np.array(image)
    except DamagedFile:
        raise
    except Exception as error:  # a damaged file can make Pillow raise anything
        raise DamagedFile(f"alpha cannot be read: {error}") from error


def reduce_alpha(alpha: np.ndarray, scale: int) -> np.ndarray:
    """Means of squares of `scale` pixels, those at the edges of what is there: (H, W) -> (ceil(H/scale), ceil(W/scale))."""
    if scale == 1:
        return alpha
    return np.rint(Image.fromarray(alpha.astype(np.float32)).reduce(scale)).astype(alpha.dtype)
