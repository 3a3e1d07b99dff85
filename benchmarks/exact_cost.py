"""What exact arithmetic costs in rate and distortion: real files of a folder's pictures, exact against float, effort 0.

    python benchmarks/exact_cost.py KODAK -o results/exact_cost.json

Prints mean bytes and PSNR at each quality and the BD-rate of exact against float (cubic fit on the means).
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from mlic.bdrate import bd_rate
from mlic.codec import encode_picture
from mlic.metrics import psnr
from mlic.pictures import read_pixels
from mlic.weights import load_model


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-q", "--quality", "qualities", multiple=True, type=float, default=(10, 30, 50, 70, 90), show_default=True)
@click.option("--model", default="fast", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(folder: Path, qualities: tuple[float, ...], model: str, output: Path | None) -> None:
    network = load_model(model)
    pictures = [read_pixels(path) for path in sorted(folder.glob("*.png"))]
    curves: dict[str, list[list[float]]] = {"exact": [], "float": []}
    for quality in tqdm(qualities, unit="quality"):
        for name, curve in curves.items():
            exact = name == "exact"
            coded = [encode_picture(network, picture, quality, exact=exact, effort=0, reconstruct=True) for picture in pictures]
            pairs = list(zip(coded, pictures))
            bpp = [8 * len(c.data) / (p.pixels.shape[0] * p.pixels.shape[1]) for c, p in pairs]
            decibel = [psnr(c.reconstruction, p.pixels) for c, p in pairs]
            curve.append([float(np.mean(bpp)), float(np.mean(decibel))])
    rate = bd_rate(curves["float"], curves["exact"])
    for quality, fixed, floating in zip(qualities, curves["exact"], curves["float"]):
        print(f"quality {quality:3g}: exact {fixed[0]:.5f} bpp {fixed[1]:.4f} dB, float {floating[0]:.5f} {floating[1]:.4f}")
    print(f"BD-rate of exact against float: {rate:+.4f}%")
    if output:
        record = {"model": model, "weights": network.digest.hex(), "bd_rate_percent": rate, "curves": curves}
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
