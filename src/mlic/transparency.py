"""Transparency: a cheap colour for what nobody sees, and what a picture looks like on white."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from .bands import bands


def fill_transparent(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) pixels, (H, W) alpha -> pixels that, where alpha is 0, take their colour from visible ones nearby.

    Visible pixels stay as they are. Push and pull: means of the visible pixels over squares of 4, 8, 16, ... pixels a
    side, of which the smallest that has any gives the colour, smoothly. With none visible, all is black.
    """
    if alpha.all():
        return pixels
    height, width = alpha.shape
    quarter = np.empty((-(-height // 4), -(-width // 4), 4), np.float32)
    for rows in bands(height):
        seen = alpha[rows, :, None] > 0
        shown = np.concatenate([pixels[rows] * seen, seen], 2)
        quarter[rows.start // 4 : -(-rows.stop // 4)] = _each(shown, lambda channel: channel.reduce(4))
    coarse = [Image.fromarray(channel) for channel in _filled(quarter).transpose(2, 0, 1)]
    filled = pixels.copy()
    for rows in bands(height):
        hidden = alpha[rows] == 0
        if hidden.any():
            box = (0, rows.start / 4, width / 4, rows.stop / 4)
            smooth = [c.resize((width, len(hidden)), Image.Resampling.BILINEAR, box) for c in coarse]
            filled[rows][hidden] = np.rint(np.dstack(smooth)[hidden])
    return filled


def _filled(means: np.ndarray) -> np.ndarray:
    """(h, w, 4) float32: means of colours, 0 where hidden, and the share of the visible -> (h, w, 3) without holes."""
    share = means[..., 3:]
    colours = means[..., :3] / np.where(share > 0, share, 1)
    if share.all() or share.size == 1:
        return colours
    coarse = _filled(_each(means, lambda channel: channel.reduce(2)))
    size = means.shape[1::-1]
    double = _each(coarse, lambda channel: channel.resize(size, Image.Resampling.BILINEAR, (0, 0, size[0] / 2, size[1] / 2)))
    return np.where(share > 0, colours, double)


def _each(values: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """(h, w, c), each channel changed by Pillow, float32."""
    return np.dstack([change(Image.fromarray(channel)) for channel in values.transpose(2, 0, 1).astype(np.float32)])


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) pixels and (H, W) alpha, 8 or 16 bits -> opaque pixels of the same type."""
    white = np.iinfo(pixels.dtype).max
    laid = np.empty_like(pixels)
    for rows in bands(len(pixels)):
        a = alpha[rows, :, None].astype(np.uint64)
        laid[rows] = (pixels[rows] * a + (white - a) * white + white // 2) // white
    return laid
