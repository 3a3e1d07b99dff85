"""The alpha channel in a file: lossless, as a PNG of its own."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, PngImagePlugin

from .errors import DamagedFile


def alpha_bytes(alpha: np.ndarray) -> bytes:
    """(H, W) uint8 or uint16 -> a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(alpha).save(buffer, "PNG", optimize=alpha.size < 1 << 24)
    return buffer.getvalue()


def alpha_from_bytes(data: bytes, width: int, height: int, depth: int) -> np.ndarray:
    """-> (height, width) uint8, or uint16 for depth 16. Raises DamagedFile when the PNG is not that."""
    try:
        # not by Image.open, which warns of large pictures: their size is checked
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            if image.size != (width, height) or image.mode != ("I;16" if depth == 16 else "L"):
                raise DamagedFile(f"alpha is {image.size[0]}x{image.size[1]} in mode {image.mode}")
            if data[24] != depth:  # in its IHDR: Pillow makes 8 bits of fewer
                raise DamagedFile(f"alpha has {data[24]} bits")
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
