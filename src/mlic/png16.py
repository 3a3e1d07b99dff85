"""A writer of 16-bit PNG: Pillow's writes no 16-bit colour."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

from .bands import bands


def png16(values: np.ndarray, chunks: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """(H, W, 1..4) uint16: grey, with alpha, RGB or RGBA -> a PNG file. `chunks` (kind, data) go before the pixels."""
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    parts += [_chunk(kind, data) for kind, data in chunks]
    squeeze = zlib.compressobj(strategy=zlib.Z_RLE)  # after Paeth's filter no worse on photographs, and 4 times as fast
    above = np.zeros((1, width, channels), np.uint16)
    for rows in bands(height):
        packed = squeeze.compress(_filtered(np.concatenate([above, values[rows]])))
        above = values[rows][-1:]
        if packed:
            parts.append(_chunk(b"IDAT", packed))
    parts += [_chunk(b"IDAT", squeeze.flush()), _chunk(b"IEND", b"")]
    return b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _filtered(values: np.ndarray) -> bytes:
    """(1 + h, w, c) uint16 -> h filtered rows; the first one is only what is above them."""
    raw = values.astype(">u2").view(np.uint8).reshape(len(values), -1)
    now, up, step = raw[1:], raw[:-1], 2 * values.shape[2]
    left, corner = np.zeros_like(now), np.zeros_like(now)
    left[:, step:], corner[:, step:] = now[:, :-step], up[:, :-step]
    out = np.empty((len(now), 1 + now.shape[1]), np.uint8)
    out[:, 0] = 4
    out[:, 1:] = now - _paeth(left, up, corner)
    return out.tobytes()


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """PNG's predictor: whichever of the three is closest to left + up - corner."""
    to_left = up.astype(np.int16) - corner
    to_up = left.astype(np.int16) - corner
    to_corner = np.abs(to_left + to_up)
    to_left, to_up = np.abs(to_left), np.abs(to_up)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
