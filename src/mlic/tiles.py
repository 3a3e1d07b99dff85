"""Large pictures in tiles: each tile's latent is coded by itself, while the transforms see past its edges.

g_a and g_s are given `margin` pixels of the neighbours on every side, more than they can see, so that latent and decoded
picture are those of the picture in one piece: only the entropy model starts anew in each tile, and no seam can show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .config import ModelConfig
from .model import STRIDE

SIDE = 1024  # pixels, of the tiles of pictures that are large
LARGE = 1 << 21  # pixels: pictures beyond it are tiled
LATENT = 16  # pixels a latent position stands for, each way

Item, Result = TypeVar("Item"), TypeVar("Result")
Progress = Callable[[int, int], None]  # tiles done, tiles in all


class Box(NamedTuple):
    """Part of a picture, in pixels; bottom and right are one past the end."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def grown(self, by: int, within: Box) -> Box:
        return Box(self.top - by, self.left - by, self.bottom + by, self.right + by).cut(within)

    def cut(self, other: Box) -> Box:
        return Box(
            max(self.top, other.top),
            max(self.left, other.left),
            min(self.bottom, other.bottom),
            min(self.right, other.right),
        )

    def meets(self, other: Box) -> bool:
        return min(self.cut(other).size) > 0

    def aligned(self, to: int) -> Box:
        """The smallest box around it whose edges are multiples of `to`.

        >>> Box(3, 16, 20, 40).aligned(16)
        Box(top=0, left=16, bottom=32, right=48)
        """
        return Box(self.top // to * to, self.left // to * to, -(-self.bottom // to) * to, -(-self.right // to) * to)

    def within(self, outer: Box, unit: int = 1) -> tuple[slice, slice]:
        """Where it lies in an array that holds `outer`, one element for each `unit` pixels."""
        top, left = (self.top - outer.top) // unit, (self.left - outer.left) // unit
        height, width = (-(-side // unit) for side in self.size)
        return slice(top, top + height), slice(left, left + width)


def boxes(height: int, width: int, side: int) -> list[Box]:
    """The tiles of a picture, row by row; `side` 0: one.

    >>> boxes(100, 200, 128)
    [Box(top=0, left=0, bottom=100, right=128), Box(top=0, left=128, bottom=100, right=200)]
    """
    whole = Box(0, 0, height, width)
    if not side:
        return [whole]
    tops, lefts = range(0, height, side), range(0, width, side)
    return [Box(top, left, top + side, left + side).cut(whole) for top in tops for left in lefts]


def default_side(height: int, width: int) -> int:
    return SIDE if height * width > LARGE else 0


def margin(config: ModelConfig) -> int:
    """Pixels that g_a and g_s see beyond an edge, at most, in whole latent positions."""
    if config.transform == "residual":
        return 128
    fine, coarse = config.depth  # 3x3 convolutions: 2 in each block at 1/8 and 1/16, and head, tail, down
    return -(-(8 * (2 * fine + 2) + 16 * 2 * coarse) // LATENT) * LATENT


def around(config: ModelConfig, part: Box, whole: Box) -> Box:
    """What g_a and g_s have to be given of a picture for a part of it, in whole latent positions."""
    return part.aligned(LATENT).grown(margin(config), whole.aligned(STRIDE))


def gather(pieces: dict[Box, Tensor], part: Box) -> Tensor:
    """The latent (1, M, h/16, w/16) of a part of the picture, from those of the tiles; zeros where there is none."""
    some = next(iter(pieces.values()))
    out = some.new_zeros(1, some.shape[1], part.size[0] // LATENT, part.size[1] // LATENT)
    for box, piece in pieces.items():
        if box.meets(part):
            shared = box.cut(part)
            (rows, columns), (own_rows, own_columns) = shared.within(part, LATENT), shared.within(box, LATENT)
            out[:, :, rows, columns] = piece[:, :, own_rows, own_columns]
    return out


class Workers:
    """Runs a function over tiles, side by side on CPUs, each with one of torch's threads; in order of the tiles. A tile that
    is the only one has all threads, unless it is `one_of` several that were coded side by side.
    """

    def __init__(self, tiles: int, device: torch.device, progress: Progress | None = None, *, one_of: int = 0) -> None:
        self.threads = min(torch.get_num_threads(), max(tiles, one_of)) if device.type == "cpu" else 1
        self.all_threads = torch.get_num_threads()
        self.tiles, self.done, self.progress = tiles, 0, progress
        self.pool = ThreadPoolExecutor(self.threads, initializer=lambda: torch.set_num_threads(1)) if self.threads > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.all_threads)  # some libraries keep one number for all threads

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        def run(item: Item) -> Result:
            with torch.inference_mode():  # which each thread has to enter
                return function(item)

        return self.pool.map(run, items) if self.pool else map(run, items)

    def tick(self) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, self.tiles)
