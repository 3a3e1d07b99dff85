"""What `--effort` brings and costs: BD-rate against effort 0 and seconds to encode, real files.

    python benchmarks/effort.py fast PICTURES -j 2
    python benchmarks/effort.py fast PICTURES --effort 4 --before EARLIER      # and against other weights at the same effort

Of the middle of each picture, at six qualities; both by the pictures' means.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch

from mlic.bdrate import compare_curves
from mlic.codec import decode_file, encode_picture
from mlic.container import MlicFile
from mlic.evaluate import find_pictures
from mlic.metrics import psnr
from mlic.pictures import Picture, read_pixels
from mlic.weights import load_model

QUALITIES = (20, 35, 50, 65, 80, 95)


def middle(pixels: np.ndarray, size: int) -> Picture:
    top, left = (max(0, (side - size) // 2) for side in pixels.shape[:2])
    return Picture(np.ascontiguousarray(pixels[top : top + size, left : left + size]))


@click.command()
@click.argument("weights")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--size", default=256, show_default=True, help="Pixels a side of the middles.")
@click.option("--every", default=1, show_default=True, help="Take every n-th picture.")
@click.option("--effort", "efforts", multiple=True, type=int, default=(1, 2, 3, 4, 8), show_default=True)
@click.option("--before", help="Other weights, to compare with.")
@click.option("-j", "--threads", default=2, show_default=True)
def main(weights: str, folder: Path, size: int, every: int, efforts: tuple[int, ...], before: str | None, threads: int) -> None:
    torch.set_num_threads(threads)
    model = load_model(weights)
    pictures = [middle(read_pixels(path).pixels, size) for path in find_pictures([folder])[0][::every]]
    encode_picture(model, pictures[0])  # what is done once only is not counted

    def curve(effort: int, model=model) -> tuple[list[tuple[float, float]], float]:
        points, seconds = [], 0.0
        for quality in QUALITIES:
            started = time.perf_counter()
            coded = [encode_picture(model, picture, quality, effort=effort).data for picture in pictures]
            seconds += time.perf_counter() - started
            bpp = np.mean([8 * len(data) / p.pixels[..., 0].size for data, p in zip(coded, pictures)])
            decoded = [decode_file(model, MlicFile.from_bytes(data)).pixels for data in coded]
            points.append((float(bpp), float(np.mean([psnr(p.pixels, pixels) for pixels, p in zip(decoded, pictures)]))))
        return points, seconds / len(QUALITIES) / len(pictures)

    none, seconds = curve(0)
    pixels = sum(picture.pixels[..., 0].size for picture in pictures) / len(pictures)
    other = load_model(before) if before else None
    head, line = "| effort | BD-rate | seconds a megapixel |", "| ---: | ---: | ---: |"
    print(f"{head} against {before} |\n{line} ---: |" if other else f"{head}\n{line}")
    for effort in (0, *efforts):
        points, seconds = (none, seconds) if effort == 0 else curve(effort)
        row = f"| {effort} | {compare_curves(none, points).rate_cubic:+.2f}% | {seconds * 1e6 / pixels:.1f} |"
        if other:
            row += f" {compare_curves(curve(effort, other)[0], points).rate_cubic:+.2f}% |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
