"""g_s as it should be for what files hold, which is not what training showed it.

    python benchmarks/fit_synthesis.py WEIGHTS PHOTOS -c CROPS --count 320     # encode crops; goes on where it stopped
    python benchmarks/fit_synthesis.py WEIGHTS -c CROPS --steps 280 -o LATER   # fit g_s to them

Training rounds what g_a makes of a picture; a file holds what the search found, in dependent symbols, with feedback. Its y_hat
is kept for random crops of 512x512 at random levels, and g_s learns to make less error of it: biases, the gains in front of it
by level, and one factor for each row and each column of its convolutions' weights. The entropy model stays as it is, so these
files would have the same symbols. All weights at once learn these crops, and nothing that holds for others.

Cost is lambda times the squared error in percent of the crop's bits; of the last crops, which are not learnt from, it is shown.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from mlic.data import PictureBank
from mlic.feedback import search_with_feedback
from mlic.model import CompressionModel
from mlic.refine import EFFORT, Search
from mlic.strategies import Estimate
from mlic.tiles import Box
from mlic.weights import load_model, rewrite_weights, seal

SIZE, BATCH, RATE, HELD, SHOWN = 512, 8, 5e-4, 24, 40
WHOLE = Box(0, 0, SIZE, SIZE)


class Crop(NamedTuple):
    pixels: Tensor  # (3, SIZE, SIZE) uint8
    level: float
    y_hat: Tensor  # (1, M, SIZE/16, SIZE/16) float16
    bits: float


@torch.inference_mode()
def encoded(model: CompressionModel, x: Tensor, level: Tensor) -> Crop:
    """What a file of x, (1, 3, SIZE, SIZE), would hold."""
    search = Search(model, EFFORT, level)
    y, z, feedback = search_with_feedback(search, x, part=WHOLE, seen=WHOLE, whole=WHOLE)
    estimate = Estimate(y, z, model.config.slices, search.gaussian, feedback, noisy=False)
    y_hat = model.code(estimate, level)
    return Crop((255 * x[0]).round().byte(), level.item(), y_hat.half(), (estimate.y_bits + estimate.z_bits).item())


def cost(model: CompressionModel, crop: Crop) -> Tensor:
    search, x = Search(model, 0, torch.tensor([crop.level])), crop.pixels[None].float() / 255
    return 100 * search.errors(crop.y_hat.float(), x, search.weights(WHOLE, WHOLE)).sum() / crop.bits


class Factors(nn.Module):
    """For each row and each column of a convolution's weights."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(weight.shape[0], 1, 1, 1))
        self.columns = nn.Parameter(torch.zeros(1, weight.shape[1], 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.rows) * (1 + self.columns)


def fit(model: CompressionModel, learnt: list[Crop], held: list[Crop], steps: int) -> None:
    convolutions = [module for module in model.g_s.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        parametrize.register_parametrization(module, "weight", Factors(module.weight))
    gains = [parameter for name, parameter in model.gains.named_parameters() if name.startswith("decoder")]
    factors = [factor for module in convolutions for factor in module.parametrizations.weight[0].parameters()]
    free = gains + factors + [module.bias for module in convolutions]
    print(f"{sum(parameter.numel() for parameter in free)} numbers, {len(learnt)} crops, {len(held)} more to look at")
    optimiser = torch.optim.Adam([parameter.requires_grad_() for parameter in free], betas=(0.9, 0.98))
    order: list[Crop] = []
    for step in tqdm(range(steps), disable=None):
        if step % SHOWN == 0:
            show(model, held, step)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 10, 1.5 * (1 - step / steps))
        optimiser.zero_grad()
        for _ in range(BATCH):
            order = order or random.sample(learnt, len(learnt))
            (cost(model, order.pop()) / BATCH).backward()
        nn.utils.clip_grad_norm_(free, 100.0)
        optimiser.step()
    show(model, held, steps)
    for module in convolutions:
        parametrize.remove_parametrizations(module, "weight")


@torch.no_grad()
def show(model: CompressionModel, held: list[Crop], step: int) -> None:
    costs = torch.stack([cost(model, crop) for crop in held])
    levels = torch.tensor([crop.level for crop in held]) * 3 // model.config.quality_levels
    thirds = " ".join(f"{costs[levels == third].mean():.3f}" for third in range(3))
    tqdm.write(f"step {step}: {costs.mean():.3f} (thirds of the levels: {thirds})")


@click.command()
@click.argument("weights", type=click.Path(exists=True, dir_okay=False))
@click.argument("photos", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("-c", "--crops", required=True, type=click.Path(path_type=Path), help="File of encoded crops.")
@click.option("--count", type=int, help="Encode crops until there are so many.")
@click.option("--steps", default=280, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Weights file to write.")
@click.option("-j", "--threads", default=2, show_default=True)
def main(
    weights: str, photos: str | None, crops: Path, count: int | None, steps: int, output: Path | None, threads: int
) -> None:
    torch.set_num_threads(threads)
    model = load_model(weights)
    kept = [Crop(*crop) for crop in torch.load(crops, weights_only=True)] if crops.exists() else []
    if photos and count:
        bank = PictureBank([photos], smallest=SIZE)
        for index in tqdm(range(len(kept), count), "encode", disable=None):
            torch.manual_seed(index)
            level = torch.rand(1) * (model.config.quality_levels - 1)
            kept.append(encoded(model, bank.crops(1, SIZE), level))
            if len(kept) % 20 == 0 or len(kept) == count:
                torch.save([tuple(crop) for crop in kept], crops)
    if not output:
        return
    random.seed(0)
    fit(model, kept[:-HELD], kept[-HELD:], steps)
    seal(model)
    fitted = {name: value for name, value in model.state_dict().items() if name.startswith(("g_s.", "gains.decoder"))}
    note = f"g_s fitted afterwards to {len(kept) - HELD} encoded crops of 512x512: {steps} steps of {BATCH}"
    rewrite_weights(weights, output, tensors=fitted, notes={"synthesis": note})


if __name__ == "__main__":
    main()
