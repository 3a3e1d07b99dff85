"""Qualities from 1 to 100 on photographs: a larger one must never give a smaller file or a lower PSNR.

    python benchmarks/monotone.py PICTURE... [--step 1] [-o results/monotone.json]

Exits with 1 where that is not so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import numpy as np

from mlic.codec import encode_picture
from mlic.metrics import psnr
from mlic.pictures import read_pixels
from mlic.weights import load_model


@click.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--step", default=1, show_default=True, type=click.IntRange(1, 99), help="Between qualities; 100 is always one.")
@click.option("--model", default="fast", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(pictures: tuple[Path, ...], step: int, model: str, output: Path | None) -> None:
    network = load_model(model)
    qualities = [*range(1, 100, step), 100]
    rates, wrong = [], []
    for path in pictures:
        content, before, rate = read_pixels(path), (0, 0.0), []
        for quality in qualities:
            encoded = encode_picture(network, content, quality, reconstruct=True)
            now = (len(encoded.data), psnr(encoded.reconstruction, content.pixels))
            if now[0] < before[0] or now[1] < before[1]:
                fall = f"{before[0]} bytes {before[1]:.3f} dB -> {now[0]} bytes {now[1]:.3f} dB"
                wrong.append(f"{path.name}, quality {quality}: {fall}")
            rate.append(8 * now[0] / (content.pixels.shape[0] * content.pixels.shape[1]))
            before = now
        rates.append(rate)
        print(f"{path.name}: {rate[0]:.4f} to {rate[-1]:.4f} bpp", flush=True)
    mean = np.mean(rates, 0)
    print(f"mean of {len(pictures)}: {mean[0]:.4f} to {mean[-1]:.4f} bpp at {len(qualities)} qualities")
    print("\n".join(wrong) or "monotone")
    if output:
        record = {"weights": network.digest.hex(), "pictures": len(pictures), "qualities": qualities, "wrong": wrong}
        output.write_text(json.dumps({**record, "mean_bpp": [round(float(b), 5) for b in mean]}) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
