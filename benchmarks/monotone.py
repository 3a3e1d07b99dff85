"""Every quality from 1 to 100 on one photograph: a larger one must never give a smaller file or a lower PSNR.

    python benchmarks/monotone.py PICTURE

Exits with 1 where that is not so.
"""

from __future__ import annotations

import sys

import click

from mlic.codec import encode_picture
from mlic.metrics import psnr
from mlic.pictures import read_picture
from mlic.weights import load_model


@click.command()
@click.argument("picture")
@click.option("--model", default="fast", show_default=True)
def main(picture: str, model: str) -> None:
    network, content = load_model(model), read_picture(picture)
    before, wrong = (0, 0.0), []
    for quality in range(1, 101):
        encoded = encode_picture(network, content, quality, reconstruct=True)
        now = (len(encoded.data), psnr(encoded.reconstruction, content.pixels))
        if now[0] < before[0] or now[1] < before[1]:
            wrong.append(f"{quality}: {before[0]} bytes {before[1]:.3f} dB -> {now[0]} bytes {now[1]:.3f} dB")
        if quality in (1, 25, 50, 75, 100):
            bpp = 8 * now[0] / (content.pixels.shape[0] * content.pixels.shape[1])
            print(f"quality {quality:3}: {now[0]:7} bytes  {bpp:.4f} bpp  {now[1]:.2f} dB")
        before = now
    print("\n".join(wrong) or "monotone")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
