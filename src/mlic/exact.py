"""Layers whose result does not depend on the machine, on fixed-point numbers (grid.py).

Everything that decides a table row (h_s, contexts, entropy parameters, LRP, the quantised latent) is computed on grids:
activations are multiples of 2^-12 below 2^11, weights multiples of 2^-16. A convolution's partial sums are then
multiples of 2^-28 below 2^25, which float64 holds exactly, so that no order of summation, thread count, instruction set
or library changes them, nor another way to the same sum (Winograd's for 3x3 kernels). GELU, tanh and exp are tables;
softmax and LayerNorm are exact sums and single IEEE divisions and square roots, rounded back onto the grid. Knows
nothing of training or files.
"""

from __future__ import annotations

import copy
import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import HalfTanh, LinearAttention, SoftmaxAttention, WindowAttention
from .entropy_model import Settle
from .grid import FRACTION, LIMIT, function_table, settle, settle_units, to_grid
from .model import CompressionModel
from .prior import LevelTable

WEIGHT_FRACTION = 16  # bits behind the point of a weight
LARGEST = 2 * LIMIT  # what a layer may be given: an activation, or a sum of two
HEADROOM = 2.0 ** (53 - FRACTION - WEIGHT_FRACTION)  # what a convolution's sums must stay below
LONGEST = 1 << 17  # positions an attention may sum over
NORM_LIMIT = 2.0**8  # LayerNorm's input: its sums of squares must stay exact

_making = threading.Lock()  # threads that begin together make a twin once


class Table(nn.Module):
    """A function of grid.py, looked up at grid points; inputs beyond the table take its ends."""

    def __init__(self, name: str, low: float = -8.0, high: float = 8.0) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.register_buffer("values", torch.from_numpy(function_table(name)))

    def forward(self, x: Tensor) -> Tensor:
        index = x.clamp(self.low, self.high).sub_(self.low).mul_(2.0**FRACTION).int()
        return self.values.index_select(0, index.flatten()).view(x.shape)


class ExactGELU(Table):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= self.high, x, super().forward(x))


def _weights(module: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """A layer's weight and bias on their grids. Raises ValueError when its sums might not be exact."""
    weight = to_grid(module.weight.detach().double(), WEIGHT_FRACTION)
    bias = to_grid(module.bias.detach().double(), FRACTION + WEIGHT_FRACTION)
    largest = _largest_sum(weight, bias, LARGEST)
    if not largest < HEADROOM:
        raise ValueError(f"weights are too large for exact arithmetic: sums up to {largest:.3g}, limit {HEADROOM:.3g}")
    return weight, bias


def _largest_sum(weight: Tensor, bias: Tensor, largest: float) -> float:
    """The most that a layer's partial sums can reach when its inputs reach `largest`."""
    return (weight.abs().flatten(1).sum(1) * largest + bias.abs()).max().item()


class ExactConv2d(nn.Module):
    """A convolution as one matrix product. Weights, here and below, are such that sums count units of 2^-FRACTION."""

    def __init__(self, module: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = module.kernel_size[0], module.stride[0], module.padding[0]
        self.register_buffer("weight", weight.flatten(1) * 2.0**FRACTION)
        self.register_buffer("bias", bias[:, None] * 2.0**FRACTION)

    def forward(self, x: Tensor) -> Tensor:
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in x.shape[2:])
        if not self.padding and height == width == 1:  # one product for all windows
            return settle_units((x.flatten(1) @ self.weight.T).add_(self.bias.T))[:, :, None, None]
        if self.kernel == 1 and self.stride == 1:
            columns = x.flatten(2)
        else:
            columns = F.unfold(x, self.kernel, padding=self.padding, stride=self.stride)
        return settle_units((self.weight @ columns).add_(self.bias)).unflatten(2, (height, width))


class ExactDepthwise(nn.Module):
    """A depthwise 3x3 convolution as shifted products."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.permute(2, 3, 0, 1).unsqueeze(4) * 2.0**FRACTION)  # (3, 3, C, 1, 1)
        self.register_buffer("bias", bias[:, None, None] * 2.0**FRACTION)

    def forward(self, x: Tensor) -> Tensor:
        padded, total = F.pad(x, (1, 1, 1, 1)), self.bias.expand(x.shape).contiguous()
        for i in range(3):
            for j in range(3):
                total.addcmul_(padded[:, :, i : i + x.shape[2], j : j + x.shape[3]], self.weight[i, j])
        return settle_units(total)


class ExactWinograd(nn.Module):
    """A 3x3 convolution by Winograd's F(2x2, 3x3): 16 products for each 2x2 outputs, not 36 (Lavin & Gray 2016).

    It only adds, subtracts and halves beside them: with two more bits its sums are exact too, and the results the same.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight * 2.0**FRACTION)  # (16, outputs, inputs), from `winograd_weight`
        self.register_buffer("bias", bias[:, None, None, None, None] * 2.0**FRACTION)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        tiles = F.pad(x.transpose(0, 1), (1, 1 + width % 2, 1, 1 + height % 2))
        tiles = self._differences(self._differences(tiles, 3), 3)  # (4, 4, C, B, tile rows, tile columns)
        rows, columns = tiles.shape[4:]
        sums = torch.bmm(self.weight, tiles.view(16, x.shape[1], -1)).view(4, 4, -1, batch, rows, columns)
        self._fold(sums)
        self._fold(sums[:2].transpose(0, 1))
        out = sums.new_empty(batch, sums.shape[2], rows, 2, columns, 2)
        torch.add(sums[:2, :2].permute(3, 2, 4, 0, 5, 1), self.bias, out=out)
        return settle_units(out.view(batch, -1, 2 * rows, 2 * columns)[:, :, :height, :width])

    @staticmethod
    def _differences(x: Tensor, dim: int) -> Tensor:
        """Each window of four along `dim`, two apart, as (a - c, b + c, c - b, b - d), in a new first dimension."""
        count = x.shape[dim] // 2 - 1
        a, b, c, d = (x[(slice(None),) * dim + (slice(k, k + 2 * count, 2),)] for k in range(4))
        out = x.new_empty(4, *a.shape)
        for k, (left, right, sign) in enumerate([(a, c, -1), (b, c, 1), (c, b, -1), (b, d, -1)]):
            torch.add(left, right, alpha=sign, out=out[k])
        return out

    @staticmethod
    def _fold(x: Tensor) -> None:
        """x[0], x[1] = x[0] + x[1] + x[2], x[1] - x[2] - x[3], in place."""
        x[0].add_(x[1]).add_(x[2])
        x[1].sub_(x[2]).sub_(x[3])


def winograd_weight(weight: Tensor) -> Tensor:
    """(outputs, inputs, 3, 3) -> (16, outputs, inputs), multiples of a quarter of the grid."""
    turn = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]).to(weight) / 2
    return torch.einsum("ai,bj,mcij->abmc", turn, turn, weight).flatten(0, 1)


def exact_conv(module: nn.Conv2d) -> nn.Module:
    """The fastest form that is exact for these weights; all give the same numbers. Raises ValueError for convolutions of
    other kinds than the models have.
    """
    plain = module.kernel_size == (3, 3) and module.stride == module.padding == (1, 1)
    square = all(len({*sides}) == 1 for sides in (module.kernel_size, module.stride, module.padding))
    depthwise = plain and module.groups == module.in_channels == module.out_channels
    usual = module.dilation == (1, 1) and module.padding_mode == "zeros" and module.bias is not None
    if not (square and usual and (module.groups == 1 or depthwise)):
        raise ValueError(f"{module} has no exact form: take a square one with bias and zeros around, or a depthwise 3x3")
    weight, bias = _weights(module)
    if module.groups > 1:
        return ExactDepthwise(weight, bias)
    if plain:
        turned = winograd_weight(weight)
        if _largest_sum(turned.transpose(0, 1), bias, 4 * LARGEST) < HEADROOM / 4:
            return ExactWinograd(turned, bias)
    return ExactConv2d(module, weight, bias)


class ExactLinear(nn.Module):
    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        weight, bias = _weights(module)
        self.register_buffer("weight", weight * 2.0**FRACTION)
        self.register_buffer("bias", bias * 2.0**FRACTION)

    def forward(self, x: Tensor) -> Tensor:
        return settle_units((x @ self.weight.T).add_(self.bias))


class ExactLayerNorm(nn.Module):
    """(C x - sum x) / sqrt(C sum x^2 - (sum x)^2 + C^2 eps): exact up to one square root and one division."""

    def __init__(self, module: nn.LayerNorm) -> None:
        super().__init__()
        self.channels, self.eps = module.normalized_shape[0], module.eps
        if self.channels > 64:
            raise ValueError(f"LayerNorm over {self.channels} channels is not exact; at most 64")
        self.register_buffer("weight", to_grid(module.weight.detach().double()))
        self.register_buffer("bias", to_grid(module.bias.detach().double()))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-NORM_LIMIT, NORM_LIMIT)
        total, count = x.sum(-1, keepdim=True), self.channels
        variance = count * (x * x).sum(-1, keepdim=True) - total * total
        normal = to_grid((count * x - total) / (variance + count * count * self.eps).sqrt())
        return settle(normal * self.weight + self.bias)


class ExactLeakyReLU(nn.Module):
    """x above zero; below, x times the slope, in one product that is the same on every machine, back on the grid."""

    def __init__(self, module: nn.LeakyReLU) -> None:
        super().__init__()
        self.slope = module.negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, settle_units(x * (self.slope * 2.0**FRACTION)))


class _ExactAttention(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.heads = getattr(module, "heads", None)
        self.exp = Table("exp", -16.0, 0.0)  # of values <= 0; below -16 it is zero

    def softmax_sums(self, scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """exp(scores - max) on the grid, and its sum."""
        if scores.shape[dim] > LONGEST:
            raise ValueError(f"{scores.shape[dim]} positions are too many for exact attention: at most {LONGEST}")
        weights = self.exp(scores - scores.amax(dim, keepdim=True))
        return weights, weights.sum(dim, keepdim=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """softmax(q k^T / sqrt(d) + bias) v; (..., L, d) each."""
        scores = to_grid((q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1])) + bias)
        weights, total = self.softmax_sums(scores, -1)
        return settle(weights @ v / total)


class ExactLinearAttention(_ExactAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (self.heads, -1)) for x in (query, key, value))  # (B, h, d, L)
        weights, total = self.softmax_sums(k, 3)
        context = settle(weights @ v.transpose(2, 3) / total)  # (B, h, d, d)
        weights, total = self.softmax_sums(q, 2)
        return settle((context.transpose(2, 3) @ weights) / total).flatten(1, 2)


class ExactSoftmaxAttention(_ExactAttention):
    """In pieces of the queries, so that memory stays in proportion to the length."""

    PIECE = 256

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (self.heads, -1)).transpose(2, 3) for x in (query, key, value))  # (B, h, L, d)
        pieces = [self.attend(piece, k, v) for piece in q.split(self.PIECE, 2)]
        return torch.cat(pieces, 2).transpose(2, 3).flatten(1, 2)


class ExactWindowAttention(_ExactAttention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        pieces = zip(q.split(1024, 1), k.split(1024, 1), v.split(1024, 1), to_grid(bias.double()).split(1024, 0))
        return torch.cat([self.attend(*piece) for piece in pieces], 1)


class ExactSettle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return settle(x)


class ExactLevelTable(nn.Module):
    """Rows on the grid, linear between levels that are multiples of 1/256."""

    def __init__(self, module: LevelTable) -> None:
        super().__init__()
        if module.smooth.any():
            raise ValueError("fold the level tables before making them exact")
        self.register_buffer("rows", to_grid(module.rows.detach().double()))

    def forward(self, level: Tensor) -> Tensor:
        code = (level.double() * 256).round().long()
        below, weight = (code // 256).clamp(max=len(self.rows) - 1), (code % 256).double()[:, None] / 256
        above = (below + 1).clamp(max=len(self.rows) - 1)
        return settle(self.rows[below] * (1 - weight) + self.rows[above] * weight)


REPLACEMENTS = {
    nn.Conv2d: exact_conv,
    nn.Linear: ExactLinear,
    nn.LayerNorm: ExactLayerNorm,
    nn.LeakyReLU: ExactLeakyReLU,
    nn.GELU: lambda _: ExactGELU("gelu"),
    HalfTanh: lambda _: Table("half_tanh"),
    LevelTable: ExactLevelTable,
    Settle: lambda _: ExactSettle(),
    SoftmaxAttention: ExactSoftmaxAttention,
    LinearAttention: ExactLinearAttention,
    WindowAttention: ExactWindowAttention,
}
EXACT_AS_THEY_ARE = (nn.ReLU, nn.PixelShuffle, nn.PixelUnshuffle, nn.Identity)  # they move values or leave zeros


def make_exact(module: nn.Module) -> nn.Module:
    """A copy of a net whose every inexact part is replaced; it takes and gives grid activations in float64. What a module
    that is made of others does between them, with parameters and buffers of its own that are put on the grid, must be exact
    in itself: sums, concatenations, moving values.

    Raises ValueError when its weights are too large for exact sums, and for layers that have no exact form here.
    """
    kind = type(module)
    if kind in REPLACEMENTS:
        return REPLACEMENTS[kind](module)
    if not module._modules and kind not in (*EXACT_AS_THEY_ARE, nn.Sequential, nn.ModuleList):
        known = ", ".join(sorted(layer.__name__ for layer in (*REPLACEMENTS, *EXACT_AS_THEY_ARE)))
        raise ValueError(f"{kind.__name__} has no exact form: use {known}, give it one in exact.py, or take exact=False")
    clone = copy.copy(module)
    clone._modules = {name: None if child is None else make_exact(child) for name, child in module._modules.items()}
    clone._parameters = {
        name: None if p is None else nn.Parameter(to_grid(p.detach().double()), requires_grad=False)
        for name, p in module._parameters.items()
    }
    clone._buffers = {
        name: to_grid(buffer.double()) if buffer is not None and buffer.is_floating_point() else buffer
        for name, buffer in module._buffers.items()
    }
    return clone


def exact_twin(model: CompressionModel) -> CompressionModel:
    """A model that shares all weights with this one, but decides table rows in exact arithmetic. Made once, then kept.

    Raises ValueError when the weights are too large for exact sums.
    """
    with _making:
        twin, device = model.__dict__.get("_exact_twin"), model.prior.median.device
        if twin is None or twin.prior.median.device != device:
            twin = copy.copy(model)
            twin._modules = dict(model._modules)
            twin.h_s, twin.entropy_model = make_exact(model.h_s), make_exact(model.entropy_model)
            twin.prior = copy.copy(model.prior)
            twin.prior._parameters = {"median": nn.Parameter(to_grid(model.prior.median.double()), requires_grad=False)}
            if model.gains is not None:
                twin.gains = copy.copy(model.gains)
                twin.gains._modules = {**model.gains._modules, "phi_h": ExactLevelTable(model.gains.phi_h)}
            twin.to(device)
            model.__dict__["_exact_twin"] = twin
    return twin
