"""What the driver asks: given the mean and scale of a part of a slice, which values does it take?

Five answers: noisy training estimate, rounded estimate, the same as something to differentiate, writing symbols, reading
symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .checkerboard import QUARTERS, WHOLE, Places, Step, pack, place, unpack
from .config import ANCHOR, NON_ANCHOR
from .prior import FactorizedPrior, GaussianPrior

if TYPE_CHECKING:  # training runs without the coder's package
    from .coder import SymbolDecoder, SymbolEncoder


class Strategy:
    z_size: tuple[int, int]  # height and width of z
    keep: int | None = None  # slices to walk; None: all

    def hyper(self, prior: FactorizedPrior, level: Tensor | None, places: Places) -> Tensor:
        """-> z_hat at some places, or all, of which nothing else is known."""
        raise NotImplementedError

    def hyper_given(self, places: Places, mean: Tensor, scale: Tensor) -> Tensor:
        """-> z_hat at some more places, given those before."""
        raise NotImplementedError

    def latent(self, i: int, part: bool | Step, mean: Tensor, scale: Tensor) -> Tensor:
        """-> packed y_hat of a part of slice i, before its LRP."""
        raise NotImplementedError

    def settled(self, i: int, half: bool, y_hat: Tensor) -> None:
        """Called after each half, with what slice i is so far, (B, C_i, H, W), and zeros where nothing is known."""


# What a picture's half that has settled makes of its y, (1, M, H, W), where that is still to be quantised; None: nothing
Feedback = Callable[[int, bool, Tensor], Tensor | None]


class Quantising(Strategy):
    """What has a y to quantise, (B, M, H, W), a z, (B, N, h, w), and for each picture a feedback, or none at all."""

    def __init__(
        self, y: Tensor, z: Tensor, slices: tuple[int, ...], gaussian: GaussianPrior, feedback: Sequence[Feedback] = ()
    ) -> None:
        self.z, self.slices, self.gaussian, self.feedback = z, slices, gaussian, feedback
        self.z_size = (z.shape[2], z.shape[3])
        self.heard: tuple[Tensor, ...] = ()  # by slice: zeros for silent channels, ones for others
        if gaussian.silent:
            heard = y.new_ones(1, y.shape[1], 1, 1)
            heard[:, list(gaussian.silent)] = 0
            self.heard = heard.split(slices, 1)
        self._take(y)

    def _take(self, y: Tensor) -> None:
        self.y = y.split(self.slices, 1)
        self.halves = {part: pack(y, part).split(self.slices, 1) for part in (ANCHOR, NON_ANCHOR)}

    def packed(self, i: int, part: bool | Step) -> Tensor:
        """What y has at a part of a slice."""
        return pack(self.y[i], part) if isinstance(part, Step) else self.halves[part][i]

    def residual(self, i: int, part: bool | Step, mean: Tensor) -> Tensor:
        """How far y is from its mean there; in silent channels, where y has no say, it is not."""
        residual = self.packed(i, part) - mean
        return residual * self.heard[i] if self.heard else residual

    def settled(self, i: int, half: bool, y_hat: Tensor) -> None:
        if self.feedback:
            moved = [picture(i, half, own) for picture, own in zip(self.feedback, y_hat.split(1))]
            if moved[0] is not None:
                self._take(torch.cat(moved))


class _Through(torch.autograd.Function):
    """A value whose gradient goes straight to x, as if it were x (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class Estimate(Quantising):
    """Bits of a latent under the model, of the symbols that a file would hold.

    `noisy`, as in training: values have straight-through gradients, and the rate's gradients for y and the means are
    those of uniform noise in place of rounding (Minnen & Singh 2020); scales learn from the symbols. z's rate is the
    noise's. Coding tables that follow counted symbols make real files a little smaller than this (docs/training.md).

    After the walk, `z_bits` and `y_bits` are (B,) sums in bits, and `slice_bits` lists (B,) tensors per slice.
    """

    def __init__(
        self,
        y: Tensor,
        z: Tensor,
        slices: tuple[int, ...],
        gaussian: GaussianPrior,
        feedback: Sequence[Feedback] = (),
        *,
        noisy: bool,
    ) -> None:
        prior = gaussian.plain() if noisy else gaussian
        super().__init__(y.float(), z.float(), slices, prior, feedback)  # no bfloat16 of autocast
        self.noisy = noisy
        # slice and part, and what `GaussianPrior.bits` takes
        self.said: list[tuple[tuple[int, bool | Step], tuple[Tensor, Tensor, Tensor]]] = []
        self.spent: list[Tensor] = []  # the bits of dependent symbols, if there are any
        self.z_bits = torch.zeros(())

    def hyper(self, prior: FactorizedPrior, level: Tensor | None, places: Places) -> Tensor:
        median, z = prior.median[None, :, None, None], self.z[(..., *places)]
        residual = z - median
        z_hat = (_Through.apply(residual, residual.detach().round()) + median).to(median.dtype)
        at = z + torch.rand_like(z) - 0.5 if self.noisy else z_hat
        self.z_bits = -prior.likelihood(at, level).log2().flatten(1).sum(1)
        return z_hat

    def hyper_given(self, places: Places, mean: Tensor, scale: Tensor) -> Tensor:
        z = self.z[(..., *places)]
        residual = z - mean
        symbols = residual.detach().round()
        self._add_z_bits(symbols, scale, residual + torch.rand_like(residual) - 0.5 if self.noisy else residual)
        return _Through.apply(z, (symbols + mean).detach())

    def _add_z_bits(self, symbols: Tensor, scale: Tensor, at: Tensor) -> None:
        self.z_bits = self.z_bits + self.gaussian.plain().bits(symbols, scale, at).flatten(1).sum(1)

    def latent(self, i: int, part: bool | Step, mean: Tensor, scale: Tensor) -> Tensor:
        kind, mean = mean.dtype, mean.float()
        residual = self.residual(i, part, mean)
        values = self._quantise(residual.detach(), scale.detach())
        self.said.append(((i, part), (values, scale, residual)))
        y_hat = values + mean
        if self.noisy:
            y_hat = _Through.apply(self.packed(i, part), y_hat.detach())
        return y_hat if kind == torch.bfloat16 else y_hat.to(kind)

    def _quantise(self, residual: Tensor, scale: Tensor) -> Tensor:
        levels, spent = self.gaussian.quantise(residual, scale)
        if spent is not None:
            self.spent.append(spent)
        return self.gaussian.values(levels, scale)

    def _all_said(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, scales and residuals so far in coding order, each (B, number of symbols): all at once, for speed."""
        values, scale, at = zip(*(three for _, three in self.said))
        return tuple(torch.cat([x.flatten(1) for x in same], 1) for same in (values, scale, at))

    def _bits(self) -> Tensor:
        """Of each symbol."""
        values, scale, at = self._all_said()
        bits = self.gaussian.bits(values, scale, at + torch.rand_like(at) - 0.5 if self.noisy else at)
        if not self.spent:
            return bits
        spent = torch.cat([x.flatten(1) for x in self.spent], 1)  # of which a Gaussian's bits have the slopes
        return bits + torch.where(spent > 0, spent - bits, 0).detach()

    @property
    def y_bits(self) -> Tensor:
        return self._bits().sum(1)

    @property
    def slice_bits(self) -> list[Tensor]:
        sums = [torch.zeros(())] * len(self.y)
        parts = self._bits().split([three[0][0].numel() for _, three in self.said], 1)
        for ((i, _), _), bits in zip(self.said, parts):
            sums[i] = sums[i] + bits.sum(1)
        return sums

    def whole(self, packed: Iterable[Tensor]) -> Tensor:
        """Packed tensors of all parts, in coding order -> one like y, (B, M, H, W)."""
        slices: list[Tensor | int] = [0] * len(self.y)
        for ((i, part), _), tensor in zip(self.said, packed):
            slices[i] = slices[i] + unpack(tensor, part)
        return torch.cat(slices, 1)


class Relaxed(Estimate):
    """The rounded estimate, whose bits and y_hat can be differentiated by `z_values`, the parts of z_hat, and by `values`: what
    y_hat is made of before the latent residual predictions, both in coding order, at the symbols that a file would hold.
    """

    def __init__(self, y: Tensor, z: Tensor, slices: tuple[int, ...], gaussian: GaussianPrior) -> None:
        super().__init__(y, z.detach().requires_grad_(), slices, gaussian, noisy=False)
        self.values: list[Tensor] = []
        self.z_values: list[Tensor] = []

    def hyper(self, prior: FactorizedPrior, level: Tensor | None, places: Places) -> Tensor:
        self.z_values.append(super().hyper(prior, level, places))
        return self.z_values[-1]

    def hyper_given(self, places: Places, mean: Tensor, scale: Tensor) -> Tensor:
        with torch.no_grad():
            values = (self.z[(..., *places)] - mean).round() + mean
        values.requires_grad_()
        self._add_z_bits(values - mean, scale, values - mean)
        self.z_values.append(values)
        return values

    def whole_z(self, parts: Sequence[Tensor]) -> Tensor:
        """Something for each of `z_values` -> one tensor like z, (B, N, h, w)."""
        everywhere = QUARTERS if len(parts) > 1 else [WHOLE]
        return torch.stack([place(part, places, self.z_size) for part, places in zip(parts, everywhere)]).sum(0)

    def latent(self, i: int, part: bool | Step, mean: Tensor, scale: Tensor) -> Tensor:
        with torch.no_grad():
            values = self._quantise(self.residual(i, part, mean), scale) + mean
        values.requires_grad_()
        self.said.append(((i, part), (values - mean, scale, values - mean)))
        self.values.append(values)
        return values


class Write(Quantising):
    """Encoding: rounds a batch's latents and hands each picture's symbols and table rows to its SymbolEncoder."""

    def __init__(
        self,
        y: Tensor,
        z: Tensor,
        slices: tuple[int, ...],
        gaussian: GaussianPrior,
        out: Sequence[SymbolEncoder],
        feedback: Sequence[Feedback] = (),
    ) -> None:
        super().__init__(y, z, slices, gaussian, feedback)
        self.out = out

    def hyper(self, prior: FactorizedPrior, level: Tensor | None, places: Places) -> Tensor:
        median = prior.median[None, :, None, None]
        symbols = (self.z[(..., *places)] - median).round()
        rows = np.repeat(np.arange(prior.channels), symbols.shape[2] * symbols.shape[3])
        for encoder, picture in zip(self.out, _to_numpy(symbols)):
            encoder.put_hyper(picture, rows)
        return symbols + median

    def hyper_given(self, places: Places, mean: Tensor, scale: Tensor) -> Tensor:
        symbols = (self.z[(..., *places)] - mean).round()
        for encoder, picture, rows in zip(self.out, _to_numpy(symbols), _to_numpy(self.gaussian.index(scale))):
            encoder.put_plain(picture, rows)
        return symbols + mean

    def latent(self, i: int, part: bool | Step, mean: Tensor, scale: Tensor) -> Tensor:
        levels, _ = self.gaussian.quantise(self.residual(i, part, mean), scale)
        for encoder, picture, rows in zip(self.out, _to_numpy(levels), _to_numpy(self.gaussian.index(scale))):
            encoder.put_latent(picture, rows)
        return self.gaussian.values(levels, scale) + mean


class Read(Strategy):
    """Decoding: asks each picture's SymbolDecoder for its symbols; z is `z_size` = (height, width).

    `keep` bounds the slices that are read; the rest of y_hat is zero.
    """

    def __init__(
        self, z_size: tuple[int, int], gaussian: GaussianPrior, sources: Sequence[SymbolDecoder], *, keep: int | None = None
    ) -> None:
        self.z_size, self.gaussian, self.sources, self.keep = z_size, gaussian, sources, keep

    def hyper(self, prior: FactorizedPrior, level: Tensor | None, places: Places) -> Tensor:
        height, width = (len(range(side)[part]) for side, part in zip(self.z_size, places))
        rows = np.repeat(np.arange(prior.channels), height * width)
        symbols = np.stack([source.get_hyper(rows) for source in self.sources])
        symbols = torch.from_numpy(symbols).to(prior.median).view(-1, prior.channels, height, width)
        return symbols + prior.median[None, :, None, None]

    def hyper_given(self, places: Places, mean: Tensor, scale: Tensor) -> Tensor:
        rows = _to_numpy(self.gaussian.index(scale))
        symbols = np.stack([source.get_plain(picture) for source, picture in zip(self.sources, rows)])
        return torch.from_numpy(symbols).to(mean).view_as(mean) + mean

    def latent(self, i: int, part: bool | Step, mean: Tensor, scale: Tensor) -> Tensor:
        rows = _to_numpy(self.gaussian.index(scale))
        levels = np.stack([source.get_latent(picture) for source, picture in zip(self.sources, rows)])
        return self.gaussian.values(torch.from_numpy(levels).to(mean).view_as(mean), scale) + mean


def _to_numpy(x: Tensor) -> np.ndarray:
    """Symbols or rows: (B, C, H, W) -> (B, C * H * W) int32, each picture in C order (channel, row, column)."""
    return x.to(torch.int32).flatten(1).cpu().numpy()
