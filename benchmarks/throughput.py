"""Pictures a second of `encode_batch` and `decode_batch`: real files, many pictures at once, on any device.

    python benchmarks/throughput.py PICTURES --device cuda --batch 16

The middle 512x768 of each picture, or 768x512 turned; the same pictures again until a batch is full. Without search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

from mlic.evaluate import find_pictures
from mlic.pictures import read_pixels
from mlic.tensors import decode_batch, encode_batch
from mlic.weights import load_model

HEIGHT, WIDTH = 512, 768


def middle(path: Path) -> np.ndarray | None:
    pixels = read_pixels(path).pixels
    if pixels.shape[0] > pixels.shape[1]:
        pixels = np.rot90(pixels)
    top, left = (pixels.shape[0] - HEIGHT) // 2, (pixels.shape[1] - WIDTH) // 2
    return None if min(top, left) < 0 else pixels[top : top + HEIGHT, left : left + WIDTH]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default="fast", show_default=True)
@click.option("-q", "--quality", default=50.0, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--repeat", default=5, show_default=True, help="Batches, after one that is not timed; the median counts.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("-j", "--threads", default=2, show_default=True)
def main(folder: Path, model: str, quality: float, batch: int, repeat: int, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    network = load_model(model, device=device)
    pictures = [pixels for pixels in map(middle, find_pictures([folder])[0]) if pixels is not None]
    if not pictures:
        raise click.UsageError(f"no picture of {WIDTH}x{HEIGHT} or more in {folder}")
    chosen = np.stack([pictures[i % len(pictures)] for i in range(batch)])
    x = torch.from_numpy(chosen).permute(0, 3, 1, 2).contiguous().to(device)

    def rate(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeat + 1):
            begun = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return batch / float(np.median(seconds[1:]))

    effort = 0 if network.config.variable_rate else None
    asked = quality if network.config.variable_rate else None
    print("| arithmetic | encode | decode |\n| --- | ---: | ---: |")
    for name, exact in (("exact", True), ("float", False)):
        files = encode_batch(x, asked, network, exact=exact, effort=effort)
        encoded = rate(lambda: encode_batch(x, asked, network, exact=exact, effort=effort))
        decoded = rate(lambda: decode_batch(files, network, device))
        print(f"| {name} | {encoded:.1f} | {decoded:.1f} |", flush=True)


if __name__ == "__main__":
    main()
