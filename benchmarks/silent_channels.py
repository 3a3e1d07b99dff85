"""Channels of y that no symbols should be in: what a one there costs, and what it would in the others.

    python benchmarks/silent_channels.py WEIGHTS PICTURES
    python benchmarks/silent_channels.py EARLIER PICTURES -o LATER   # keep those that break silent

A channel in which training had next to no symbols can still matter, by what is predicted there. A symbol then is something
that no net has ever seen, and a block may break. Of the middle 256x256 of each picture, without search and with plain symbols:
how many of a million are other than zero; and for channels that have few, by how many bits lambda times the squared error and
the rate rise on average where one symbol is one.
"""

from __future__ import annotations

import copy
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from mlic.data import PictureBank
from mlic.model import CompressionModel
from mlic.refine import Search
from mlic.strategies import Estimate
from mlic.tiles import Box
from mlic.validation import middle
from mlic.weights import load_model, rewrite_weights

SIZE, QUALITIES = 256, (5, 20, 60, 95)
FEW, DEAR = 1e-4, 60.0  # share of symbols; bits: three times what a one costs elsewhere
APART = 6  # latent positions between two ones


class Estimates:
    """Of one picture at one quality, with plain symbols."""

    def __init__(self, model: CompressionModel, x: Tensor, quality: float) -> None:
        self.model, self.x = model, x
        self.level = torch.full((1,), (quality - 1) / 99 * (model.config.quality_levels - 1))
        self.gaussian = copy.copy(model.gaussian.plain())
        self.gaussian.silent = ()
        y = model.analyse(x, self.level)
        self.z = model.h_a(y)
        self.search, whole = Search(model, 0, self.level), Box(0, 0, *x.shape[2:])
        self.weights = self.search.weights(whole, whole)
        estimate, _ = self.run(y)
        self.symbols, residuals = (estimate.whole(said[k] for _, said in estimate.said) for k in (0, 2))
        self.means = y - residuals
        self.gaussian.error_bits = None  # from here on the nearest symbols, which of these values are the same
        _, self.cost = self.run(self.means + self.symbols)

    def run(self, y: Tensor) -> tuple[Estimate, float]:
        """What it costs in bits."""
        estimate = Estimate(y, self.z, self.model.config.slices, self.gaussian, noisy=False)
        errors = self.search.errors(self.model.code(estimate, self.level), self.x, self.weights)
        return estimate, float(errors.sum() + estimate.y_bits.sum())

    def rise(self, channel: int) -> float:
        """Bits that a one costs, on average of some places."""
        y, places = self.means + self.symbols, (0, channel, slice(2, None, APART), slice(2, None, APART))
        y[places] = self.means[places] + 1
        return (self.run(y)[1] - self.cost) / y[places].numel()


@click.command()
@click.argument("weights")
@click.argument("pictures", type=click.Path(exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Weights file to write.")
@click.option("--every", default=1, show_default=True, help="Take every n-th picture.")
@click.option("-j", "--threads", default=2, show_default=True)
@torch.inference_mode()
def main(weights: str, pictures: str, output: Path | None, every: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model, bank = load_model(weights), PictureBank([pictures], smallest=SIZE)
    tried = [[Estimates(model, middle(bank, i, SIZE), q) for i in range(0, len(bank), every)] for q in QUALITIES]
    used = np.array([np.mean([(one.symbols != 0).double().mean((0, 2, 3)).numpy() for one in same], 0) for same in tried])
    few = np.flatnonzero((used < FEW).all(0))
    print(f"{len(few)} channels with few symbols\n")
    heads = [f"{what}, quality {quality}" for what in ("of a million", "a one") for quality in QUALITIES]
    print("| channel | " + " | ".join(heads) + " |\n| ---: |" + " ---: |" * len(heads))
    silent = []
    for channel in few.tolist():
        rises = [float(np.mean([one.rise(channel) for one in same])) for same in tried]
        shown = [f"{1e6 * share:.0f}" for share in used[:, channel]] + [f"{rise:+.0f}" for rise in rises]
        print(f"| {channel} | " + " | ".join(shown) + " |", flush=True)
        if max(rises) > DEAR:
            silent.append(channel)
    print(f"\nsilent: {' '.join(map(str, silent))}")
    if output:
        rewrite_weights(weights, output, notes={"silent": " ".join(map(str, silent))})


if __name__ == "__main__":
    main()
