"""How many channels the linear 16x16 transforms of `fast` need: a plain block DCT codec that keeps the first of them.

    python benchmarks/latent_channels.py PICTURES

For each step size, coefficients are quantised with a dead zone, and their rate is the empirical entropy of each channel
over all pictures (the middle 512x512 of each): no contexts, no nets. What is left out bounds PSNR from above; the table
says what that costs at each quality.
"""

from __future__ import annotations

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from mlic.bdrate import compare_curves
from mlic.data import PictureBank
from mlic.transforms import block_dct
from mlic.validation import middle

STEPS = (0.28, 0.2, 0.14, 0.1, 0.07, 0.05)  # of orthonormal coefficients of pixels in 0..1
ROUNDING = 0.38  # added before rounding down
SIZE = 512


def entropy(symbols: Tensor) -> float:
    """Bits of all symbols together, by how often each occurs."""
    counts = torch.unique(symbols, return_counts=True)[1].double()
    return -(counts * (counts / counts.sum()).log2()).sum().item()


@click.command()
@click.argument("pictures", type=click.Path(exists=True, file_okay=False))
@click.option("--keep", multiple=True, type=int, default=(320, 384, 448, 512, 768), show_default=True)
def main(pictures: str, keep: tuple[int, ...]) -> None:
    bank, dct = PictureBank([pictures], smallest=SIZE), block_dct(768)
    x = torch.cat([middle(bank, index, SIZE) for index in range(len(bank))])
    coefficients = torch.einsum("ij,bjhw->bihw", dct, F.pixel_unshuffle(x - 0.5, 16))

    def psnr(kept: Tensor) -> float:
        picture = F.pixel_shuffle(torch.einsum("ij,bihw->bjhw", dct[: kept.shape[1]], kept), 16) + 0.5
        return -10 * (picture.clamp(0, 1) - x).square().flatten(1).mean(1).log10().mean().item()

    curves: dict[int, list[tuple[float, float]]] = {count: [] for count in keep}
    for step in STEPS:
        symbols = coefficients.sign() * (coefficients.abs() / step + ROUNDING).floor()
        bits = torch.tensor([entropy(symbols[:, channel]) for channel in range(max(keep))])
        for count, points in curves.items():
            points.append((bits[:count].sum().item() / x.shape[0] / SIZE**2, psnr(symbols[:, :count] * step)))
    print("| channels | PSNR unquantised | " + " | ".join(f"step {step:g}" for step in STEPS) + " | BD-rate |")
    print("| ---: " * (len(STEPS) + 3) + "|")
    for count, points in curves.items():
        cells = [f"{rate:.3f} bpp, {quality:.2f} dB" for rate, quality in points]
        delta = compare_curves(curves[keep[0]], points).rate_cubic
        print(f"| {count} | {psnr(coefficients[:, :count]):.1f} dB | {' | '.join(cells)} | {delta:+.1f}% |")


if __name__ == "__main__":
    main()
