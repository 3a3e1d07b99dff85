"""Give weights the nets that code z in quarters, trained on z alone: the rest, and what g_s makes of it, stays as it is.

    python benchmarks/hyper_context.py EARLIER.safetensors PHOTOS -o LATER.safetensors
    python benchmarks/hyper_context.py WEIGHTS PHOTOS        # measure only: bits of z in quarters against the prior's

`mlic train` trains them with everything else; this is for weights whose run had ended before there were such nets. Prints
the bits of z on the last eighth of the crops, on which nothing was trained.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import torch
from torch import Tensor

from mlic.checkerboard import WHOLE
from mlic.config import FAST
from mlic.data import PictureBank
from mlic.learning import begin_from
from mlic.model import CompressionModel, build_model
from mlic.strategies import Estimate
from mlic.validation import symbol_counts
from mlic.weights import load_model, save_weights

BATCH, CROP, LEARNING_RATE = 32, 512, 2e-3


@torch.no_grad()
def all_z(model: CompressionModel, bank: PictureBank, count: int) -> list[tuple[Tensor, Tensor]]:
    """z of random crops, one by one, (1, N, 8, 8), at random levels (1,)."""
    seen = []
    for _ in range(count):
        level = torch.rand(1) * (model.config.quality_levels - 1)
        seen.append((model.h_a(model.analyse(bank.crops(1, CROP), level)), level))
    return seen


def estimate(model: CompressionModel, z: Tensor, *, noisy: bool) -> Estimate:
    """For z alone: its y has no positions."""
    nothing = z.new_zeros(len(z), model.config.latent_channels, 0, 0)
    return Estimate(nothing, z, model.config.slices, model.gaussian, noisy=noisy)


def bits_in_quarters(model: CompressionModel, z: Tensor, level: Tensor, *, noisy: bool = False) -> Tensor:
    strategy = estimate(model, z, noisy=noisy)
    model.entropy_model.walk_hyper(model.prior, level, strategy)
    return strategy.z_bits.sum()


def bits_of_prior(model: CompressionModel, z: Tensor, level: Tensor) -> Tensor:
    strategy = estimate(model, z, noisy=False)
    strategy.hyper(model.prior, level, WHOLE)
    return strategy.z_bits.sum()


def learn(model: CompressionModel, seen: list[tuple[Tensor, Tensor]], steps: int) -> None:
    nets = model.requires_grad_(False).entropy_model.hyper.requires_grad_(True)
    adam = torch.optim.Adam(nets.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, step / 50) * (1 - step / steps))
    for step in range(steps):
        z, level = (torch.cat(same) for same in zip(*(seen[i] for i in torch.randint(len(seen), (BATCH,)))))
        top, left = torch.randint(2, (2,))  # each position in each quarter
        loss = bits_in_quarters(model, z[:, :, top:, left:], level, noisy=True) / z.numel()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        adam.step()
        rate.step()
        if step % 250 == 0:
            click.echo(f"step {step}: {loss.item():.4f} bits for each value of z", err=True)


@click.command()
@click.argument("weights")
@click.argument("photos", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Weights file to write, after training.")
@click.option("--crops", default=1536, show_default=True, help="Of 512x512 pixels.")
@click.option("--steps", default=3000, show_default=True, help="Of 32 crops.")
@click.option("-j", "--threads", default=2, show_default=True)
def main(weights: str, photos: tuple[str, ...], output: Path | None, crops: int, steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    given = model = load_model(weights)
    bank = PictureBank(photos, smallest=CROP)
    seen = all_z(given, bank, crops)
    cut = len(seen) * 7 // 8
    if output:
        model = build_model(dataclasses.replace(given.config, hyper_hidden=FAST.hyper_hidden))
        begin_from(model, given)
        learn(model, seen[:cut], steps)
        model.gaussian.counts = symbol_counts(model, bank, crop=CROP, batches=8)
        told = f"trained afterwards: {steps} steps of {BATCH}, on z of {cut} random crops of {CROP}x{CROP}, seed 0"
        save_weights(output, model, half=True, notes={"hyper": told})
    with torch.no_grad():
        print("| levels | bits a pixel for z, prior alone | in quarters | |\n| --- | ---: | ---: | ---: |")
        for low in range(0, model.config.quality_levels, 16):
            some = [(z, level) for z, level in seen[cut:] if low <= level < low + 16]
            plain, quarters = (
                float(sum(bits(model, *one) for one in some)) / len(some) / CROP**2
                for bits in (bits_of_prior, bits_in_quarters)
            )
            print(f"| {low} to {low + 16} | {plain:.5f} | {quarters:.5f} | {100 * (quarters / plain - 1):+.1f}% |")


if __name__ == "__main__":
    main()
