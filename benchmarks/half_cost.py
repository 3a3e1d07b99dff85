"""What storing weights in float16 costs: a training checkpoint's averaged weights as they are, and through a weights file.

    python benchmarks/half_cost.py runs/fast/checkpoint.pt PICTURES

Rate is the model's estimate without noise, on the middle 512x512 of each picture, at seven quality levels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch

from mlic.bdrate import compare_curves
from mlic.data import PictureBank
from mlic.model import STRIDE, CompressionModel, build_model
from mlic.validation import validate, validation_levels
from mlic.weights import load_model, save_weights


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False))
@click.argument("pictures", type=click.Path(exists=True, file_okay=False))
@click.option("--model", default="fast", show_default=True)
def main(checkpoint: str, pictures: str, model: str) -> None:
    whole = build_model(model).eval()
    whole.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["average"])
    bank = PictureBank([pictures], smallest=STRIDE)

    def curve(of: CompressionModel) -> list[tuple[float, float]]:
        return [(row["bpp"], row["psnr"]) for row in validate(of, bank, validation_levels(of))]

    before = curve(whole)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.safetensors"
        save_weights(path, whole, half=True)  # rounds `whole` itself, too
        after = curve(load_model(str(path)))
    print("| bpp, float32 | float16 | PSNR dB, float32 | float16 |\n| ---: | ---: | ---: | ---: |")
    for (rate, psnr), (half_rate, half_psnr) in zip(before, after):
        print(f"| {rate:.5f} | {half_rate:.5f} | {psnr:.4f} | {half_psnr:.4f} |")
    print(f"\nBD-rate of float16 against float32: {compare_curves(before, after).rate_cubic:+.4f}%")


if __name__ == "__main__":
    main()
