"""How much an error should weigh, in bits, when symbols are chosen: BD-rates against always taking the nearest.

    python benchmarks/error_bits.py fast PICTURES

Rate is the model's estimate without noise, on the middle of each picture, at seven quality levels.
"""

from __future__ import annotations

import click

from mlic.bdrate import compare_curves
from mlic.data import PictureBank
from mlic.model import STRIDE
from mlic.validation import validate, validation_levels
from mlic.weights import load_model


@click.command()
@click.argument("weights")
@click.argument("pictures", type=click.Path(exists=True, file_okay=False))
@click.option("--size", default=256, show_default=True, help="Pixels a side of the middles.")
@click.option("--bits", multiple=True, type=float, default=(40, 25, 20, 15, 12, 9), show_default=True)
def main(weights: str, pictures: str, size: int, bits: tuple[float, ...]) -> None:
    model, bank = load_model(weights), PictureBank([pictures], smallest=STRIDE)

    def curve(error_bits: float | None) -> list[tuple[float, float]]:
        model.gaussian.error_bits = error_bits
        return [(row["bpp"], row["psnr"]) for row in validate(model, bank, validation_levels(model), size)]

    own, nearest = model.gaussian.error_bits, curve(None)
    print(f"the weights' own: {own}\n\n| error_bits | BD-rate |\n| ---: | ---: |", flush=True)
    for value in bits:
        print(f"| {value:g} | {compare_curves(nearest, curve(value)).rate_cubic:+.2f}% |", flush=True)


if __name__ == "__main__":
    main()
