"""The two halves of a latent plane, and the three steps in which the first half may be coded.

Anchors sit where (row + column) is odd, non-anchors where it is even, as in the MLIC family. A half is kept packed,
(B, C, H, W) -> (B, C, H, W/2): what is needed at one parity alone is computed on half the positions.

In steps, the anchors of even rows come first: they are a plane of half the size, with anchors (FIRST) and non-anchors
(SECOND) of its own. Each anchor of an odd row (THIRD) then has four of them around it.

A plane of z, which may have odd sides, is coded whole or in quarters: rows and columns of one parity each.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor


class Step(enum.Enum):
    """A part of the anchors; packed it is (B, C, H/2, W/4), THIRD (B, C, H/2, W/2)."""

    FIRST, SECOND, THIRD = 1, 2, 3


FIRST, SECOND, THIRD = Step
Places = tuple[slice, slice]  # rows and columns of z
WHOLE: Places = (slice(None), slice(None))
QUARTERS: tuple[Places, ...] = tuple((slice(i, None, 2), slice(j, None, 2)) for i, j in ((0, 0), (1, 1), (0, 1), (1, 0)))


def even_anchors(x: Tensor) -> Tensor:
    """The anchors of even rows, as a plane: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return x[:, :, ::2, 1::2]


def pack(x: Tensor, part: bool | Step) -> Tensor:
    """Keep one parity, ANCHOR or NON_ANCHOR: (B, C, H, W) -> (B, C, H, W/2); or one step of the anchors. H and W must be
    even, and for steps so must W/2.

    >>> x = torch.arange(8.0).view(1, 1, 2, 4)
    >>> pack(x, True).tolist()
    [[[[1.0, 3.0], [4.0, 6.0]]]]
    """
    if part is THIRD:
        return x[:, :, 1::2, ::2]
    if isinstance(part, Step):
        return pack(even_anchors(x), part is FIRST)
    if torch.compiler.is_compiling():  # it fuses what it understands, which strides are not
        return torch.stack([x[:, :, ::2, part::2], x[:, :, 1::2, 1 - part :: 2]], 3).flatten(2, 3)
    return _Move.apply(x, part, _pack, _unpack) if x.requires_grad else _pack(x, part)


def unpack(packed: Tensor, part: bool | Step) -> Tensor:
    """Undo `pack`, with zeros elsewhere: (B, C, H, W/2) -> (B, C, H, W), or from a step of the anchors.

    >>> unpack(torch.ones(1, 1, 2, 2), False).tolist()
    [[[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]]]
    """
    if isinstance(part, Step):
        plane = packed if part is THIRD else unpack(packed, part is FIRST)
        out = plane.new_zeros(*plane.shape[:2], 2 * plane.shape[2], 2 * plane.shape[3])
        (out[:, :, 1::2, ::2] if part is THIRD else even_anchors(out)).copy_(plane)
        return out
    if torch.compiler.is_compiling():
        out = packed.new_zeros(*packed.shape[:3], 2 * packed.shape[3])
        out[:, :, ::2, part::2], out[:, :, 1::2, 1 - part :: 2] = packed[:, :, ::2], packed[:, :, 1::2]
        return out
    return _Move.apply(packed, part, _unpack, _pack) if packed.requires_grad else _unpack(packed, part)


def _empty(x: Tensor, width: int) -> Tensor:
    """Like x but for its width; channels that lie next to each other stay so."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    kind = torch.channels_last if last else torch.contiguous_format
    return torch.empty(*x.shape[:3], width, dtype=x.dtype, device=x.device, memory_format=kind)


def _places(x: Tensor, part: bool) -> Tensor:
    """One parity as a view of pairs of rows: (B, C, H, W) -> (B, C, H/2, 2, W/2)."""
    batch, channels, height, width = x.shape
    by_batch, by_channel, by_row, by_column = x.stride()
    size = (batch, channels, height // 2, 2, width // 2)
    to_next = by_row + by_column if not part else by_row - by_column  # the second row of a pair begins at the other column
    stride = (by_batch, by_channel, 2 * by_row, to_next, 2 * by_column)
    return x.as_strided(size, stride, x.storage_offset() + by_column * part)


def _pack(x: Tensor, part: bool) -> Tensor:
    out = _empty(x, x.shape[3] // 2)
    places = _places(x, part)
    out.view(places.shape).copy_(places)
    return out


def _unpack(packed: Tensor, part: bool) -> Tensor:
    out = _empty(packed, 2 * packed.shape[3]).zero_()
    places = _places(out, part)
    places.copy_(packed.reshape(places.shape))
    return out


class _Move(torch.autograd.Function):
    """`_pack` or `_unpack`, with the other as its gradient, which takes fewer kernels than autograd's own."""

    @staticmethod
    def forward(ctx, x: Tensor, part: bool, there: Callable, back: Callable) -> Tensor:
        ctx.part, ctx.back = part, back
        return there(x, part)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad, ctx.part), None, None, None


def keep(x: Tensor, anchor: bool) -> Tensor:
    """Zero the other parity, keep the shape."""
    return unpack(pack(x, anchor), anchor)


def place(values: Tensor, places: Places, size: tuple[int, int]) -> Tensor:
    """A plane of `size` = (H, W) with these values at some places, and zeros elsewhere: (B, C, h, w) -> (B, C, H, W)."""
    out = values.new_zeros(*values.shape[:2], *size)
    out[(..., *places)] = values
    return out
