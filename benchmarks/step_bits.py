"""What the first slice costs: bits of a position in each step of its anchors, and in its non-anchors.

    python benchmarks/step_bits.py fast PICTURES

The first step knows nothing of the slice but what z says, each later part knows those before it: where a position of a
part costs less than one of the first, that is what it learned from them. Estimated without noise, on the middle 512x512
of each picture, at seven quality levels.
"""

from __future__ import annotations

import click
import torch
from torch import Tensor

from mlic.checkerboard import Step
from mlic.config import NON_ANCHOR
from mlic.data import PictureBank
from mlic.model import STRIDE
from mlic.strategies import Estimate
from mlic.validation import middle, validation_levels
from mlic.weights import load_model

SIZE = 512
PARTS = (*Step, NON_ANCHOR)


class ByPart(Estimate):
    """Also sums the bits and the positions of each part of the first slice."""

    def __init__(self, *of, sums: dict) -> None:
        super().__init__(*of, noisy=False)
        self.sums = sums

    def latent(self, i: int, part, mean: Tensor, scale: Tensor) -> Tensor:
        values = super().latent(i, part, mean, scale)
        if i == 0:
            bits, positions = self.sums.get(part, (0, 0))
            bits += self.gaussian.bits(*self.said[-1][1]).sum().item()
            self.sums[part] = bits, positions + mean[:, 0].numel()
        return values


@click.command()
@click.argument("weights")
@click.argument("pictures", type=click.Path(exists=True, file_okay=False))
@torch.no_grad()
def main(weights: str, pictures: str) -> None:
    model, bank = load_model(weights), PictureBank([pictures], smallest=STRIDE)
    print("| level | bits of a position, step 1 | step 2 | step 3 | non-anchors | slice 1 of all bits |")
    print("| ---: " * 6 + "|")
    for level in validation_levels(model):
        at, sums, total = torch.tensor([level]), {}, 0.0
        for index in range(len(bank)):
            y = model.analyse(middle(bank, index, SIZE), at)
            estimate = ByPart(y, model.h_a(y), model.config.slices, model.gaussian, sums=sums)
            model.code(estimate, at)
            total += (estimate.y_bits + estimate.z_bits).item()
        cells = [f"{bits / positions:.2f}" for bits, positions in (sums[part] for part in PARTS)]
        share = sum(bits for bits, _ in sums.values()) / total
        print(f"| {level:.1f} | {' | '.join(cells)} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
