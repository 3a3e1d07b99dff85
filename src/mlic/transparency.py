"""Transparency: a cheap colour for what nobody sees, and what a picture looks like on white."""

from __future__ import annotations

import numpy as np

from .bands import bands


def fill_transparent(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) pixels, (H, W) alpha -> pixels that, where alpha is 0, take their colour from visible ones nearby.

    Visible pixels stay as they are. Push and pull: means of the visible pixels over squares of 4, 8, 16, ... pixels a
    side, of which the smallest that has any gives the colour, smoothly. With none visible, all is black.
    """
    if alpha.all():
        return pixels
    height, width = alpha.shape
    quarter = np.zeros((-(-height // 4), -(-width // 4), 4), np.float32)
    for rows in bands(height):
        seen = alpha[rows, :, None] > 0
        quarter[rows.start // 4 : -(-rows.stop // 4)] = _halve(_halve(np.concatenate([pixels[rows] * seen, seen], 2)))
    coarse = np.pad(_filled(quarter), ((2, 2), (2, 2), (0, 0)), "edge")
    filled = pixels.copy()
    for rows in bands(height):
        hidden = alpha[rows] == 0
        if hidden.any():
            smooth = _double(_double(coarse[rows.start // 4 : -(-rows.stop // 4) + 4])[1:-1, 1:-1])
            filled[rows][hidden] = np.rint(smooth[: len(hidden), :width][hidden])
    return filled


def _filled(sums: np.ndarray) -> np.ndarray:
    """(h, w, 4) float32: sums of the visible pixels' colours, and their number -> (h, w, 3) colours without holes."""
    count = sums[..., 3:]
    colours = sums[..., :3] / np.maximum(count, 1)
    if count.all() or count.size == 1:
        return colours
    coarse = np.pad(_filled(_halve(sums)), ((1, 1), (1, 1), (0, 0)), "edge")
    return np.where(count > 0, colours, _double(coarse)[: sums.shape[0], : sums.shape[1]])


def _halve(values: np.ndarray) -> np.ndarray:
    """(h, w, c) -> sums over squares of 2x2, float32; an odd last row or column alone."""
    values = np.pad(values, ((0, values.shape[0] % 2), (0, values.shape[1] % 2), (0, 0)))
    pairs = np.add(values[::2], values[1::2], dtype=np.float32)
    return pairs[:, ::2] + pairs[:, 1::2]


def _double(padded: np.ndarray) -> np.ndarray:
    """(h + 2, w + 2, c), with one more at every side -> (2h, 2w, c), linear between the middles."""
    for axis in (0, 1):
        a = padded if axis == 0 else padded.swapaxes(0, 1)
        near, before, after = 0.75 * a[1:-1], 0.25 * a[:-2], 0.25 * a[2:]
        doubled = np.stack([near + before, near + after], 1).reshape(-1, *a.shape[1:])
        padded = doubled if axis == 0 else doubled.swapaxes(0, 1)
    return padded


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) pixels and (H, W) alpha, 8 or 16 bits -> opaque pixels of the same type."""
    white = np.iinfo(pixels.dtype).max
    laid = np.empty_like(pixels)
    for rows in bands(len(pixels)):
        a = alpha[rows, :, None].astype(np.uint64)
        laid[rows] = (pixels[rows] * a + (white - a) * white + white // 2) // white
    return laid
