"""The pictures of the report: one of our files, and other codecs' files of nearly the same size, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .codec import encode_picture
from .demo import detailed_box
from .errors import MlicError
from .metrics import psnr
from .model import CompressionModel
from .peers import find_peer, nearest_in_size
from .pictures import read_pixels

CROP = 96  # side of the zoomed part, in pixels


def same_size_pictures(
    paths: Sequence[Path],
    model: CompressionModel,
    *,
    quality: float | None,
    peers: Sequence[str],
    progress: Callable[[Path], None] = lambda path: None,
) -> list[dict[str, Any]]:
    """Per picture its original, our version and each peer's of the nearest file size, all embedded without loss.

    Sizes are of whole files. Where a peer has nothing within a tenth of our size, its entry says so in `note`.
    Raises MlicError for a picture or a peer that cannot be had.
    """
    codecs = [find_peer(name) for name in peers]
    entries = []
    for path in paths:
        progress(path)
        try:
            picture = read_pixels(path)
        except MlicError as error:
            raise MlicError(f"{path}: {error}") from None
        pixels = picture.pixels
        ours = encode_picture(model, picture, quality, reconstruct=True)
        setting = f" at quality {quality:g}" if quality is not None else ""
        versions = [
            _version("original", pixels, pixels, pixels.nbytes),
            _version(f"mlic {model.config.name}{setting}", pixels, ours.reconstruction, len(ours.data)),
        ]
        for codec in codecs:
            setting_of_peer, data = nearest_in_size(codec, pixels, len(ours.data))
            version = _version(f"{codec.label} at {setting_of_peer:g}", pixels, codec.decode(data), len(data))
            if abs(len(data) / len(ours.data) - 1) > 0.1:
                version["note"] = f"{codec.label} has no file nearer in size"
            versions.append(version)
        left, top, right, bottom = detailed_box(pixels, CROP)
        height, width = pixels.shape[:2]
        centre = [(left + right) / 2 / width, (top + bottom) / 2 / height]
        entries.append({"name": path.stem, "width": width, "height": height, "centre": centre, "versions": versions})
    if not entries:
        raise MlicError("no pictures to show")
    return entries


def _version(label: str, original: np.ndarray, pixels: np.ndarray, size: int) -> dict[str, Any]:
    """With the pixels as a lossless WebP, which every browser of today shows."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=60, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    exact = np.array_equal(original, pixels)
    return {"label": label, "bytes": size, "psnr": None if exact else psnr(original, pixels), "uri": uri, "note": ""}
