"""Do weights gain more on the pictures they were trained on than on others?

    python benchmarks/overfitting.py NEW OLD --trained PHOTOS --others VALIDATION --others KODAK

BD-rate of the weights NEW against OLD, by the model's estimates without search, on the middle 512x512 of each picture, as
means of the pictures' with standard errors. Then what is left of the difference between folders among pictures of equal bits
and PSNR (least squares on those of OLD at its second level), for some content is easier to gain on.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import click
import numpy as np
import torch

from mlic.bdrate import compare_curves
from mlic.data import find_pictures, read_rgb
from mlic.model import CompressionModel
from mlic.validation import reconstruct
from mlic.weights import load_model

LEVELS = (15.0, 31.0, 47.0, 60.0)


@torch.inference_mode()
def curve(model: CompressionModel, x: torch.Tensor) -> list[tuple[float, float]]:
    points = []
    for level in LEVELS:
        _, bpp, psnr = reconstruct(model, x, level)
        points.append((bpp.item(), psnr.item()))
    return points


@click.command()
@click.argument("new")
@click.argument("old")
@click.option("--trained", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--others", required=True, multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--pictures", default=96, show_default=True, help="At most so many of each folder, drawn at random.")
@click.option("-j", "--threads", default=2, show_default=True)
def main(new: str, old: str, trained: Path, others: tuple[Path, ...], pictures: int, threads: int) -> None:
    torch.set_num_threads(threads)
    before, after = load_model(old), load_model(new)
    features, gains, folders = [], [], []
    for index, folder in enumerate((trained, *others)):
        paths = find_pictures([folder])
        for path in random.Random(0).sample(paths, min(pictures, len(paths))):
            picture = read_rgb(path)
            if picture is None or min(picture.shape[:2]) < 512:
                continue
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
            top, left = ((side - 512) // 2 for side in pixels.shape[2:])
            x = pixels[:, :, top : top + 512, left : left + 512]
            was, now = curve(before, x), curve(after, x)
            bits, decibel = math.log(was[1][0]), was[1][1]
            features.append([1, bits, bits * bits, decibel, *(index == i + 1 for i in range(len(others)))])
            gains.append(100 * math.log1p(compare_curves(was, now).rate_cubic / 100))
            folders.append(index)
    gains, folders, features = np.array(gains), np.array(folders), np.array(features, float)
    print("| pictures | | BD-rate (log) |\n| --- | ---: | ---: |")
    for index, folder in enumerate((trained, *others)):
        own = gains[folders == index]
        print(f"| {folder.name} | {len(own)} | {own.mean():+.2f}% +- {own.std(ddof=1) / len(own) ** 0.5:.2f} |")
    fit, *_ = np.linalg.lstsq(features, gains, rcond=None)
    freedom = len(gains) - features.shape[1]
    errors = np.sqrt(np.diag(np.linalg.inv(features.T @ features)) * np.square(gains - features @ fit).sum() / freedom)
    for i, folder in enumerate(others):
        print(f"\n{folder.name}, at equal bits and PSNR: {fit[4 + i]:+.2f}% +- {errors[4 + i]:.2f} of {trained.name}'s")


if __name__ == "__main__":
    main()
