"""Probability models of the symbols: likelihoods for training, and how scales map to table rows.

The integer tables that real files are coded with are made from these once (tables.py) and stored with the weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dependent import FILES, FIRST_ROW, SHIFTS, STEPS, Trellis, choose, values_of
from .layers import bounded, float32_region

SCALE_MIN, SCALE_MAX, SCALE_LEVELS = 0.11, 256.0, 64
LIKELIHOOD_MIN = 1e-9
NEAREST = 1e4  # in place of `error_bits`, where the nearest value is asked for


def scale_table() -> Tensor:
    """The 64 log-spaced standard deviations, 0.11 to 256, float64."""
    return torch.from_numpy(np.geomspace(SCALE_MIN, SCALE_MAX, SCALE_LEVELS))


class LevelTable(nn.Module):
    """A learned vector for each quality level, linear in between: (B,) real levels -> (B, C).

    While training, the rows share a few cosines over the levels, so that every sample teaches all of them; `fold` adds
    these into the rows and leaves zeros.
    """

    COSINES = 4

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)  # (levels, C)
        self.smooth = nn.Parameter(torch.zeros(self.COSINES, rows.shape[1]))

    def _basis(self, level: Tensor) -> Tensor:
        k = torch.arange(self.COSINES, device=level.device, dtype=level.dtype)
        return torch.cos(math.pi * k * level[:, None] / max(1, len(self.rows) - 1))

    def forward(self, level: Tensor) -> Tensor:
        row = torch.arange(len(self.rows), device=level.device)
        near = (1 - (level.clamp(0, len(self.rows) - 1)[:, None] - row).abs()).clamp_min(0).to(self.rows.dtype)
        with float32_region(level):
            return near @ self.rows + self._basis(level) @ self.smooth

    @torch.no_grad()
    def fold(self) -> None:
        levels = torch.arange(len(self.rows), device=self.rows.device, dtype=self.rows.dtype)
        self.rows += self._basis(levels) @ self.smooth
        self.smooth.zero_()


class GaussianPrior(nn.Module):
    """Zero-mean Gaussians, integrated over unit bins. `form` says what the entropy nets emit: sigma, or log sigma.

    `error_bits`: what a squared error of one is worth in bits when a residual gets its symbol; None: the nearest always.
    `counts`: what a SymbolCounter of tables.py counted; coding tables made from this prior then follow it.
    `silent`: channels of y in which an encoder takes what is predicted for right, whatever y is.
    `lattice_bits`: what `lattice_bits` of tables.py gives; residuals then are quantised as dependent.py says, along `trellis`,
    and if it is `shifted`, with values off the lattices.
    """

    counts: np.ndarray | None = None
    silent: tuple[int, ...] = ()
    lattice_bits: Tensor | None = None
    trellis: Trellis = FILES

    def __init__(self, form: str, error_bits: float | None = None, *, shifted: bool = False) -> None:
        super().__init__()
        self.form, self.error_bits = form, error_bits
        self.register_buffer("shifts", SHIFTS.clone() if shifted else None)
        table = scale_table()
        between = (table[:-1] * table[1:]).sqrt()  # nearest level in the log domain
        self.register_buffer("thresholds", (between.log() if form == "log" else between).float())

    def index(self, scale: Tensor) -> Tensor:
        """Row of the table for each raw scale, int64 in 0..63."""
        return torch.bucketize(scale.contiguous(), self.thresholds.to(scale.dtype))

    def plain(self) -> GaussianPrior:
        """The same without dependent quantisation."""
        if self.lattice_bits is None:
            return self
        other = copy.copy(self)
        other.lattice_bits = None
        return other

    def values(self, levels: Tensor, scale: Tensor) -> Tensor:
        """What levels stand for: themselves, if not for dependent quantisation."""
        return levels if self.lattice_bits is None else values_of(levels, self.index(scale), self.shifts)

    def quantise(self, residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """The level of each residual, (B, ...), as a file holds it: a plain symbol, or a level of dependent.py; and the bits
        of the dependent ones, zeros for plain ones, None where all are.
        """
        levels = self.nearest(residual, scale)
        if self.lattice_bits is None:
            return levels, None
        rows, bits, spent = self.index(scale), self.lattice_bits.to(scale.device), torch.zeros_like(scale, dtype=torch.float32)
        dependent = (rows >= FIRST_ROW) & residual.isfinite()
        chosen, spent[dependent] = choose(
            residual[dependent],
            rows[dependent],
            dependent.nonzero()[:, 0],
            bits,
            self.error_bits or NEAREST,
            self.trellis,
            self.shifts,
        )
        levels[dependent] = chosen.to(levels.dtype)
        return levels, spent

    def nearest(self, residual: Tensor, scale: Tensor) -> Tensor:
        """The plain symbol of each residual: the nearest integer, or the next towards zero where that saves more bits than its
        squared error costs (rate-distortion optimised quantisation, Karczewicz et al., VCEG-AH21, one step and one
        symbol at a time).
        """
        if self.error_bits is None:
            return residual.round()
        size = residual.abs()
        high, inverse = size.round(), 2**-0.5 / self.sigma(scale)
        edges = torch.stack([high - 1.5, high - 0.5, high + 0.5])  # of the symbol below and of this one
        beyond = torch.erfc(edges * inverse)  # twice the mass
        below, own = beyond[:2] - beyond[1:]
        saved = (below / own.clamp_min(2 * LIKELIHOOD_MIN)).log2()
        added = 2 * (size - high) + 1  # (size - high + 1)^2 - (size - high)^2
        return torch.where(saved > self.error_bits * added, high - 1, high).copysign(residual)

    def sigma(self, scale: Tensor) -> Tensor:
        """The standard deviation a raw scale stands for, float32."""
        scale = scale.float()
        if self.form == "log":
            return bounded(scale, math.log(SCALE_MIN), math.log(SCALE_MAX)).exp()
        return bounded(scale, SCALE_MIN)

    def bits(self, symbols: Tensor, scale: Tensor, at: Tensor) -> Tensor:
        """-log2 of the likelihood of `symbols`, or of other values, elementwise. Its gradient for `scale` is that of these, its
        gradient for `at` that of the likelihood at `at`; `symbols` get none.
        """
        symbols, sigma, at = symbols.float(), self.sigma(scale), at.float()
        if self.lattice_bits is not None:  # bins as wide as one lattice has them
            rows = self.index(scale)
            wide = STEPS.to(sigma)[rows] * torch.where(rows < FIRST_ROW, 1, 2)
            symbols, sigma, at = symbols / wide, sigma / wide, at / wide
        return _Bits.apply(symbols, sigma, at, self.bits_and_slopes)

    @staticmethod
    def bits_and_slopes(symbols: Tensor, sigma: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The bits of `symbols`, their slopes by sigma, and the slopes by `at` of the bits there."""
        mass, _, by_sigma = _mass_and_slopes(symbols, sigma)
        mass_there, by_x, _ = _mass_and_slopes(at, sigma)
        return -mass.log2(), by_sigma / (mass * sigma * -math.log(2)), by_x / (mass_there * -math.log(2))


def _mass_and_slopes(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a Gaussian's mass in the bin around x, at least LIKELIHOOD_MIN: itself, its slopes by x and by log sigma."""
    size = x.abs()
    upper, lower = (0.5 - size) / sigma, (-0.5 - size) / sigma
    mass = 0.5 * (torch.erfc(upper * -(2**-0.5)) - torch.erfc(lower * -(2**-0.5)))
    high, low = (torch.exp(-0.5 * edge * edge) * (2 * math.pi) ** -0.5 for edge in (upper, lower))
    return mass.clamp_min(LIKELIHOOD_MIN), (low - high) / sigma * x.sign(), lower * low - upper * high


class _Bits(torch.autograd.Function):
    """Written out, because autograd's many small operations took longer than the networks."""

    @staticmethod
    def forward(ctx, symbols: Tensor, sigma: Tensor, at: Tensor, formula: Callable) -> Tensor:
        if not any(ctx.needs_input_grad):
            return -_mass_and_slopes(symbols, sigma)[0].log2()
        bits, *slopes = formula(symbols, sigma, at)
        ctx.save_for_backward(*slopes)
        return bits

    @staticmethod
    def backward(ctx, grad: Tensor):
        by_sigma, by_x = ctx.saved_tensors
        return None, grad * by_sigma, grad * by_x, None


class FactorizedPrior(nn.Module):
    """The learned univariate density of each channel of z (Balle et al. 2018, appendix 6.1), filters 3, 3, 3, 3.

    With `levels` > 0 the density knows the quality: each level has its own per-channel scale and shift of the density's
    argument, interpolated between levels in training.
    """

    FILTERS = (1, 3, 3, 3, 3, 1)
    INIT_SCALE = 10.0

    def __init__(self, channels: int, *, levels: int = 0) -> None:
        super().__init__()
        self.channels, self.levels = channels, levels
        spread = self.INIT_SCALE ** (1 / (len(self.FILTERS) - 1))
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for i, (inputs, outputs) in enumerate(zip(self.FILTERS, self.FILTERS[1:])):
            start = math.log(math.expm1(1 / spread / outputs))
            self.matrices.append(torch.full((channels, outputs, inputs), start))
            self.biases.append(torch.empty(channels, outputs, 1).uniform_(-0.5, 0.5))
            if i < len(self.FILTERS) - 2:
                self.factors.append(torch.zeros(channels, outputs, 1))
        self.median = nn.Parameter(torch.zeros(channels))
        if levels:
            self.level_scale = LevelTable(torch.zeros(levels, channels))  # log
            self.level_shift = LevelTable(torch.zeros(levels, channels))

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the cumulative: (C, 1, n) -> (C, 1, n), increasing in x."""
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases)):
            x = F.softplus(matrix.to(x.dtype)) @ x + bias.to(x.dtype)
            if i < len(self.factors):
                x = x + torch.tanh(self.factors[i].to(x.dtype)) * torch.tanh(x)
        return x

    def likelihood(self, z: Tensor, level: Tensor | None = None) -> Tensor:
        """P(bin of width 1 around z): (B, C, H, W), level (B,) in 0..levels-1 -> (B, C, H, W), in float32."""
        values = z.float().transpose(0, 1)  # (C, B, H, W)
        edges = torch.stack([values - 0.5, values + 0.5], 1)  # (C, 2, B, H, W)
        if self.levels:
            scale = self.level_scale(level).exp().T[:, None, :, None, None]
            edges = edges * scale + self.level_shift(level).T[:, None, :, None, None]
        with float32_region(z):
            lower, upper = self.logits(edges.flatten(1)[:, None]).chunk(2, 2)
        sign = 1.0 - 2.0 * (lower + upper > 0)  # subtract on the side where the sigmoid keeps its digits
        mass = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        return bounded(mass.reshape(values.shape).transpose(0, 1), LIKELIHOOD_MIN)
