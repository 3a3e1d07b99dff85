"""What a model in training reaches on pictures of their own: rate and PSNR by level, and pictures to look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .data import PictureBank
from .model import STRIDE, CompressionModel
from .strategies import Write
from .tables import SymbolCounter, gaussian_tables, lattice_bits


def rate_and_mse(x: Tensor, x_hat: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Per-picture (bits per pixel, MSE on 0..1), both (B,)."""
    return bits / (x.shape[2] * x.shape[3]), (x_hat.float() - x).square().mean((1, 2, 3))


def validation_levels(model: CompressionModel, count: int = 7) -> tuple[float, ...]:
    """Levels evenly from the first to the last; one where a model has one rate."""
    if not model.config.variable_rate:
        return (0.0,)
    return tuple((model.config.quality_levels - 1) * i / (count - 1) for i in range(count))


def middle(bank: PictureBank, index: int, size: int) -> Tensor:
    """The middle of a picture, at most `size` pixels a side: (1, 3, H, W) in 0..1, sides multiples of 64."""
    picture = bank.picture(index)
    height, width = (min(size, side) // STRIDE * STRIDE for side in picture.shape[1:])
    top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
    return picture[None, :, top : top + height, left : left + width].float() / 255


def reconstruct(model: CompressionModel, x: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Without noise: (reconstructions, bits per pixel, PSNR), the last two (B,)."""
    at = torch.full((len(x),), level, device=x.device) if model.config.variable_rate else None
    x_hat, estimate = model(x, at, noisy=False)
    x_hat = x_hat.clamp(0, 1)
    bpp, mse = rate_and_mse(x, x_hat, estimate.y_bits + estimate.z_bits)
    return x_hat, bpp, -10 * mse.clamp_min(1e-10).log10()


@torch.no_grad()
def validate(model: CompressionModel, bank: PictureBank, levels: tuple[float, ...], size: int = 512) -> list[dict]:
    """Mean bpp and PSNR at each level, without noise, on the middle of each picture (at most `size` pixels a side)."""
    rows = []
    for level in levels:
        seen = [reconstruct(model, x, level)[1:] for x in _middles(bank, size)]
        bpp, psnr = (torch.cat(values).mean().item() for values in zip(*seen))
        rows.append({"level": level, "bpp": bpp, "psnr": psnr})
    return rows


def _middles(bank: PictureBank, size: int) -> Iterator[Tensor]:
    """The middles of all pictures, those of one shape together as long as they have 2 megapixels at most."""
    middles = sorted((middle(bank, index, size) for index in range(len(bank))), key=lambda x: x.shape)
    for shape, same in itertools.groupby(middles, key=lambda x: x.shape):
        yield from torch.cat(list(same)).split(max(1, 2**21 // shape[2:].numel()))


@torch.no_grad()
def count_symbols(model: CompressionModel, x: Tensor, level: Tensor | None, counter: SymbolCounter) -> None:
    """Let a counter see the symbols of pictures (B, 3, H, W)."""
    y = model.analyse(x, level)
    model.code(Write(y, model.h_a(y), model.config.slices, model.gaussian, [counter] * len(x)), level)


def symbol_counts(model: CompressionModel, bank: PictureBank, *, crop: int, batches: int = 4, batch: int = 16) -> np.ndarray:
    """How often each symbol comes in each row of the Gaussians' tables, on random crops at levels from the first to the
    last: `counts` for `mlic.tables.gaussian_tables`. Dependent quantisation looks at the tables' bits: it is counted twice,
    first with those of the Gaussians.
    """
    device, dependent, counts = bank.pixels.device, model.config.dependent, None
    levels = torch.linspace(0, model.config.quality_levels - 1, batch, device=device) if model.config.variable_rate else None
    crops = [bank.crops(batch, crop) for _ in range(batches)]
    for _ in range(2 if dependent else 1):
        counter = SymbolCounter(dependent=dependent)
        if dependent:
            model.gaussian.lattice_bits = lattice_bits(gaussian_tables(counts, dependent=True))
        for x in crops:
            count_symbols(model, x, levels, counter)
        counts = counter.counts
    return counts


@torch.no_grad()
def panel(model: CompressionModel, bank: PictureBank, *, count: int = 4, size: int = 256) -> np.ndarray:
    """The middles of the first pictures, one below another, each beside what the lowest, middle and highest level make
    of it: (H, W, 3) uint8.
    """
    rows = []
    for index in range(min(count, len(bank))):
        x = middle(bank, index, size)
        shown = torch.cat([x, *(reconstruct(model, x, level)[0] for level in dict.fromkeys(validation_levels(model, 3)))], 3)
        cell = torch.zeros(3, size, shown.shape[3] // x.shape[3] * size)
        for i, part in enumerate(shown[0].cpu().split(x.shape[3], 2)):
            cell[:, : part.shape[1], i * size : i * size + part.shape[2]] = part
        rows.append(cell)
    return (torch.cat(rows, 1) * 255).round().byte().permute(1, 2, 0).numpy()
