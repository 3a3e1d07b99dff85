"""How far from where the lattices have it the value of a level should lie.

    python benchmarks/value_shifts.py WEIGHTS PICTURES             # what the weights' own shifts leave to be done
    python benchmarks/value_shifts.py EARLIER -o LATER             # give weights without shifts those of dependent.py

Of the middle 512x512 of each picture, after the encoder's search, without feedback: minus the mean slope of lambda times the
squared error by a value's size, over the curvature that the search counts on; and what such shifts would save in bits, by the
same parabola. What they bring is more, as the search then goes on from there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from mlic.data import PictureBank
from mlic.dependent import SHIFTS
from mlic.model import CompressionModel
from mlic.refine import CURVATURE, EFFORT, Search
from mlic.strategies import Relaxed
from mlic.tiles import Box
from mlic.validation import middle
from mlic.weights import load_model, rewrite_weights

SIZE, QUALITIES = 512, (20, 40, 60, 80)
ROWS = (0, 7, 8, 9, 10, 13, 16, 20, 64)  # lines of the table: from each to the next
SIZES = SHIFTS.shape[1]


class Seen(Relaxed):
    """Keeps the levels, and the rows of their scales."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def _quantise(self, residual: Tensor, scale: Tensor) -> Tensor:
        levels, spent = self.gaussian.quantise(residual, scale)
        self.seen.append((levels, self.gaussian.index(scale)))
        self.spent.append(spent)
        return self.gaussian.values(levels, scale)


def slopes(model: CompressionModel, x: Tensor, quality: float) -> tuple[np.ndarray, float]:
    """(2, 64, SIZES): how many values, and the sum of their slopes; and all bits."""
    level = torch.full((1,), (quality - 1) / 99 * (model.config.quality_levels - 1))
    search, box = Search(model, EFFORT, level), Box(0, 0, *x.shape[2:])
    y, z = search.latents(x, part=box, seen=box, whole=box)
    relaxed = Seen(y, z, model.config.slices, search.gaussian)
    with torch.enable_grad():
        errors = search.errors(model.code(relaxed, level), x, search.weights(box, box))
        found = torch.autograd.grad(errors.sum(), relaxed.values)
    sums = np.zeros((2, 64 * SIZES))
    for slope, (levels, rows) in zip(found, relaxed.seen):
        places = (rows * SIZES + levels.abs().clamp(max=SIZES - 1).long()).flatten().numpy()
        for total, weight in zip(sums, (torch.ones_like(slope), slope * levels.sign())):
            total += np.bincount(places, weights=weight.double().flatten().numpy(), minlength=total.size)
    return sums.reshape(2, 64, SIZES), float((relaxed.y_bits.sum() + relaxed.z_bits.sum()).detach())


def give_shifts(earlier: str, later: str) -> None:
    config = dataclasses.replace(load_model(earlier).config, shifted=True).to_json()
    note = "values off the lattices, added afterwards: gaussian.shifts as dependent.py begins with; nothing else changed"
    rewrite_weights(earlier, later, tensors={"gaussian.shifts": SHIFTS}, notes={"config": config, "shifted": note})


@click.command()
@click.argument("weights")
@click.argument("pictures", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Weights file to write.")
@click.option("--every", default=1, show_default=True, help="Take every n-th picture.")
@click.option("-j", "--threads", default=2, show_default=True)
def main(weights: str, pictures: str | None, output: Path | None, every: int, threads: int) -> None:
    torch.set_num_threads(threads)
    if output:
        give_shifts(weights, str(output))
        weights = str(output)
    model = load_model(weights)
    if not pictures:
        return
    bank = PictureBank([pictures], smallest=SIZE)
    print("| quality | scale's row | " + " | ".join(f"level {k}" for k in range(1, SIZES)) + " or more | saves |")
    print("| ---: | --- | " + "---: | " * SIZES)
    for quality in QUALITIES:
        each = [slopes(model, middle(bank, index, SIZE), quality) for index in range(0, len(bank), every)]
        (counts, sums), bits = sum(one for one, _ in each), sum(bits for _, bits in each)
        for low, high in zip(ROWS, ROWS[1:]):
            count, slope = (of[low:high, 1:].sum(0) for of in (counts, sums))
            shift = -slope / np.maximum(count, 1) / CURVATURE
            saved = (count * CURVATURE * shift**2 / 2).sum() / bits
            shown = " | ".join(f"{by:+.3f}" if n > 100 else "" for n, by in zip(count, shift))
            print(f"| {quality} | {low} to {high - 1} | {shown} | {saved:.2%} |", flush=True)


if __name__ == "__main__":
    main()
