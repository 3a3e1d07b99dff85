"""What coding tables that follow counted symbols save against tables of Gaussians.

    python benchmarks/counted_tables.py fast PICTURES

Bits of the latent's symbols (escapes not counted, of which there are next to none) by both tables, on the middle 512x512
of each picture, at seven quality levels.
"""

from __future__ import annotations

import click
import numpy as np
import torch

from mlic.data import PictureBank
from mlic.model import STRIDE
from mlic.tables import MAX_HALF_WIDTH, SymbolCounter, TableSet, gaussian_tables
from mlic.validation import count_symbols, middle, validation_levels
from mlic.weights import load_model

SIZE = 512


def bits(counts: np.ndarray, tables: TableSet) -> float:
    total = 0.0
    for row, counted in enumerate(counts):
        half = -tables.first[row]
        total += counted[MAX_HALF_WIDTH - half : MAX_HALF_WIDTH + half + 1] @ (24 - np.log2(tables.row(row)[:-1]))
    return total


@click.command()
@click.argument("weights")
@click.argument("pictures", type=click.Path(exists=True, file_okay=False))
def main(weights: str, pictures: str) -> None:
    model, bank = load_model(weights), PictureBank([pictures], smallest=STRIDE)
    dependent = model.config.dependent
    normal = gaussian_tables(dependent=dependent)
    print("| level | bpp, Gaussians | counted | difference |\n| ---: | ---: | ---: | ---: |")
    for level in validation_levels(model):
        at = torch.tensor([level]) if model.config.variable_rate else None
        counter, pixels = SymbolCounter(dependent=dependent), 0
        for index in range(len(bank)):
            x = middle(bank, index, SIZE)
            count_symbols(model, x, at, counter)
            pixels += x.shape[2] * x.shape[3]
        before, after = bits(counter.counts, normal), bits(counter.counts, model.tables.gaussian)
        print(
            f"| {level:.1f} | {before / pixels:.4f} | {after / pixels:.4f} | {100 * (after / before - 1):+.2f}% |", flush=True
        )


if __name__ == "__main__":
    main()
