"""16 bits per channel, read through Pillow, which by itself keeps 8 bits of colour."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .bands import bands

REDUCED = "reduced to 8 bits per channel"
# byte order of a file -> the order in which its low bytes look like high ones
LOW = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
READABLE = {"RGB;16", "RGBA;16", "RGBX;16", "R;16", "G;16", "B;16", "A;16"}


def read_deep(image: Image.Image, notes: list[str]) -> np.ndarray | None:
    """(H, W, 1..4) uint16 where an image, not loaded yet, holds 16 bits per channel that can be had; otherwise None.

    Of 16-bit colour Pillow gives the high bytes. Asked to read the other byte order, it gives the low ones, so colour
    is read twice. Formats that are reduced within Pillow's decoders (JPEG 2000, AVIF) look like 8 bits here.
    """
    key = image.info.get("transparency")
    tiles = _high_tiles(image)
    if image.mode.startswith("I;16"):
        if tiles:
            image.tile = tiles
        return _with_colour_key(np.asarray(image).astype(np.uint16)[..., None], key)
    modes = {_raw_mode(tile) for tile in tiles}
    if modes == {"LA;16B"}:  # four bytes per pixel, as RGBA has
        return _four_bytes(image, tiles)
    if not tiles or not all(mode[:-1] in READABLE for mode in modes):
        if image.mode not in ("I", "F") and any(";16" in mode for mode in modes):
            notes.append(REDUCED)
        return None
    low = _opened_again(image)
    low.tile = [_with_raw_mode(tile, _raw_mode(tile)[:-1] + LOW[_raw_mode(tile)[-1]]) for tile in tiles]
    values = np.empty((image.height, image.width, len(image.mode)), np.uint16)
    for rows in bands(image.height):
        values[rows] = _band(low, rows)
    del low
    image.tile = tiles
    for rows in bands(image.height):
        values[rows] += _band(image, rows) * np.uint16(256)
    return _with_colour_key(values, key)


def _high_tiles(image: Image.Image) -> list[Any]:
    """Pillow's instructions how to read a file, corrected where it knows the file's 16 bits too little."""
    tiles = list(getattr(image, "tile", ()))
    if image.format == "PPM" and tiles[:1] and tiles[0].codec_name in ("ppm", "ppm_plain") and tiles[0].args[0] == "RGB":
        if tiles[0].codec_name == "ppm" and tiles[0].args[1] == 65535:
            return [tiles[0]._replace(codec_name="raw", args=("RGB;16B", 0, 1))]
        return [_with_raw_mode(tile, "RGB;16 of another maximum" if tile.args[1] > 255 else "RGB") for tile in tiles]
    if image.format == "TIFF" and image._planar_configuration == 2 and 16 in image.tag_v2.get(258, ()):
        if tiles[0].codec_name == "libtiff":  # reads high bytes only
            return [_with_raw_mode(tile, "planes;16") for tile in tiles] if image.mode in ("RGB", "RGBA") else tiles
        if image.mode.startswith("I;16"):
            return [_with_raw_mode(tile, image.mode) for tile in tiles]
        order = "L" if image.tag_v2.prefix == b"II" else "B"  # Pillow takes the samples for 8 bits
        return [_with_raw_mode(tile, f"{_raw_mode(tile)};16{order}") for tile in tiles]
    return tiles


def _four_bytes(image: Image.Image, tiles: list[Any]) -> np.ndarray:
    """(H, W, 2) uint16 of 16-bit grey and alpha."""
    quads = _opened_again(image)
    quads.tile = [_with_raw_mode(tile, "RGBA") for tile in tiles]
    values = np.empty((image.height, image.width, 2), np.uint16)
    for rows in bands(image.height):
        four = _band(quads, rows)
        values[rows] = four[..., ::2] * np.uint16(256) + four[..., 1::2]
    return values


def _opened_again(image: Image.Image) -> Image.Image:
    again = Image.open(image.fp)
    again.seek(image.tell())
    return again


def _raw_mode(tile: Any) -> str:
    """How the file holds pixels, in Pillow's words: "RGB;16B" and the like."""
    args = tile[3]
    mode = args[0] if isinstance(args, tuple) and args else args
    return mode if isinstance(mode, str) else ""


def _with_raw_mode(tile: Any, mode: str) -> Any:
    return tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))


def _band(image: Image.Image, rows: slice) -> np.ndarray:
    return np.asarray(image.crop((0, rows.start, image.width, rows.stop)))


def _with_colour_key(values: np.ndarray, key: int | Sequence[int] | None) -> np.ndarray:
    """PNG may name one colour that is transparent."""
    if key is None:
        return values
    alpha = (values != np.array(key, np.uint16)).any(2) * np.uint16(65535)
    return np.concatenate([values, alpha[..., None]], 2)


def fits_8_bits(values: np.ndarray) -> bool:
    """Whether 16-bit values are 8-bit ones times 257."""
    return not any((values[rows] % 257).any() for rows in bands(len(values)))


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """uint16 -> uint8, rounded; 65535 becomes 255."""
    reduced = np.empty(values.shape, np.uint8)
    for rows in bands(len(values)):
        reduced[rows] = (values[rows].astype(np.uint32) + 128) // 257
    return reduced
