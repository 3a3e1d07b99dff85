"""Training pictures: decoded once into memory as uint8, cropped on the device that trains."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

EXTENSIONS = {".avif", ".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_pictures(folders: list[str | Path]) -> list[Path]:
    """All picture files under the folders, sorted by path."""
    return sorted(p for folder in folders for p in Path(folder).rglob("*") if p.suffix.lower() in EXTENSIONS)


def load_pictures(folders: list[str | Path], *, smallest: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Decode every picture to a (3, H, W) uint8 tensor. Unreadable ones and those with a side below `smallest` pixels
    are reported on stderr and left out. Raises ValueError when none is left.
    """
    pictures, paths = [], find_pictures(folders)
    for path in tqdm(paths, desc="decode", unit="picture", disable=None):
        try:
            with Image.open(path) as image:
                array = np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            print(f"left out {path}: {error}", file=sys.stderr)
            continue
        if min(array.shape[:2]) < smallest:
            print(f"left out {path}: {array.shape[1]}x{array.shape[0]} is below {smallest} pixels", file=sys.stderr)
            continue
        pictures.append(torch.from_numpy(array).permute(2, 0, 1).contiguous().to(device))
    if not pictures:
        raise ValueError(f"no picture to train on in {', '.join(map(str, folders))}")
    return pictures


def random_crops(pictures: list[Tensor], batch: int, size: int, generator: torch.Generator) -> Tensor:
    """(batch, 3, size, size) float32 in 0..1: random pictures, places and mirrorings, from a CPU generator."""
    draws = torch.rand(batch, 5, generator=generator).tolist()
    crops = []
    for pick, at_row, at_column, flip, turn in draws:
        picture = pictures[int(pick * len(pictures))]
        row = int(at_row * (picture.shape[1] - size + 1))
        column = int(at_column * (picture.shape[2] - size + 1))
        crop = picture[:, row : row + size, column : column + size]
        crop = crop.flip(2) if flip < 0.5 else crop
        crops.append(crop.transpose(1, 2) if turn < 0.5 else crop)
    return torch.stack(crops).float() / 255
