"""Training pictures: decoded once into one uint8 tensor on the device that trains, and cropped there."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .deep import to_8_bits
from .errors import PictureError
from .folders import picture_extensions
from .pictures import read_picture


def find_pictures(folders: Iterable[str | Path]) -> list[Path]:
    """All picture files under the folders, sorted by path."""
    extensions = picture_extensions()
    return sorted(p for folder in folders for p in Path(folder).rglob("*") if p.suffix.lower() in extensions)


def read_rgb(path: Path) -> np.ndarray | None:
    """(H, W, 3) uint8, or None with a word on stderr."""
    try:
        pixels = read_picture(path).pixels
    except PictureError as error:
        print(f"left out {path}: {error}", file=sys.stderr)
        return None
    return to_8_bits(pixels) if pixels.dtype == np.uint16 else pixels


def resize(picture: Tensor, scale: float) -> Tensor:
    """A smaller (3, H, W) uint8."""
    if scale == 1:
        return picture
    size = [round(side * scale) for side in picture.shape[1:]]
    small = F.interpolate(picture[None].float(), size=size, mode="bicubic", antialias=True)
    return small[0].round().clamp(0, 255).byte()


class PictureBank:
    """Pictures one after another in a flat uint8 tensor, each (3, H, W), with where each begins and its size, the
    largest first by their shorter sides.

    Each picture is there at all `scales`, as long as its sides are not below `smallest` pixels. Unreadable pictures and
    those too small are reported on stderr and left out. Raises ValueError when none is left.
    """

    def __init__(
        self,
        folders: Iterable[str | Path],
        *,
        smallest: int,
        scales: tuple[float, ...] = (1.0,),
        device: torch.device | str = "cpu",
    ) -> None:
        folders, pictures = list(folders), []
        paths = find_pictures(folders)
        with ThreadPoolExecutor() as pool:
            for path, array in zip(paths, tqdm(pool.map(read_rgb, paths), "decode", len(paths), disable=None)):
                if array is None:
                    continue
                if min(array.shape[:2]) < smallest:
                    size = f"{array.shape[1]}x{array.shape[0]}"
                    print(f"left out {path}: {size} is below {smallest} pixels", file=sys.stderr)
                    continue
                picture = torch.from_numpy(array).to(device).permute(2, 0, 1)
                scaled = [resize(picture, scale) for scale in scales]
                pictures += [x for x in scaled if min(x.shape[1:]) >= smallest]
        if not pictures:
            raise ValueError(f"no picture of {smallest} pixels or more a side in {', '.join(map(str, folders))}")
        pictures.sort(key=lambda x: -min(x.shape[1:]))
        self.shorter_sides = [min(x.shape[1:]) for x in pictures]
        self.pixels = torch.empty(sum(x.numel() for x in pictures), dtype=torch.uint8, device=device)
        for x, part in zip(pictures, self.pixels.split([x.numel() for x in pictures])):
            part.view(x.shape).copy_(x)
        self.height, self.width = torch.tensor([x.shape[1:] for x in pictures], device=device).T
        self.start = torch.cumsum(3 * self.height * self.width, 0) - 3 * self.height * self.width

    def __len__(self) -> int:
        return len(self.start)

    def count(self, size: int) -> int:
        """How many pictures crops of `size` pixels a side fit into. Raises ValueError when it is none."""
        fit = sum(side >= size for side in self.shorter_sides)
        if not fit:
            raise ValueError(f"no picture for crops of {size} pixels: the largest has {self.shorter_sides[0]}")
        return fit

    def picture(self, index: int) -> Tensor:
        """(3, H, W) uint8."""
        height, width, start = int(self.height[index]), int(self.width[index]), int(self.start[index])
        return self.pixels[start : start + 3 * height * width].view(3, height, width)

    def crops(self, batch: int, size: int) -> Tensor:
        """(batch, 3, size, size) float32 in 0..1: random pictures, places, mirrorings and turns, without a host sync."""
        device = self.pixels.device
        pick, row, column, mirror, turn = torch.rand(5, batch, device=device)
        pick = (pick * self.count(size)).long()
        height, width, start = self.height[pick], self.width[pick], self.start[pick]
        row, column = (row * (height - size + 1)).long(), (column * (width - size + 1)).long()
        down, across = torch.arange(size, device=device)[:, None], torch.arange(size, device=device)
        turn, mirror = (turn < 0.5)[:, None, None], (mirror < 0.5)[:, None, None]
        i, j = torch.where(turn, across, down), torch.where(turn, down, across)  # (batch, size, size)
        j = torch.where(mirror, size - 1 - j, j)
        place = (row[:, None, None] + i) * width[:, None, None] + column[:, None, None] + j
        plane = (height * width)[:, None] * torch.arange(3, device=device)
        index = (start[:, None] + plane)[:, :, None, None] + place[:, None]
        return self.pixels[index].float() / 255
