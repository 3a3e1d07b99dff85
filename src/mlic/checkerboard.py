"""The two halves of a latent plane, and the three steps in which the first half may be coded.

Anchors sit where (row + column) is odd, non-anchors where it is even, as in the MLIC family. A half is kept packed,
(B, C, H, W) -> (B, C, H, W/2): what is needed at one parity alone is computed on half the positions.

In steps, the anchors of even rows come first: they are a plane of half the size, with anchors (FIRST) and non-anchors
(SECOND) of its own. Each anchor of an odd row (THIRD) then has four of them around it.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class Step(enum.Enum):
    """A part of the anchors; packed it is (B, C, H/2, W/4), THIRD (B, C, H/2, W/2)."""

    FIRST, SECOND, THIRD = 1, 2, 3


FIRST, SECOND, THIRD = Step


def even_anchors(x: Tensor) -> Tensor:
    """The anchors of even rows, as a plane: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return x[:, :, ::2, 1::2]


def _even_rows(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[2], device=x.device) % 2 == 0)[:, None]


def pack(x: Tensor, part: bool | Step) -> Tensor:
    """Keep one parity, ANCHOR or NON_ANCHOR: (B, C, H, W) -> (B, C, H, W/2); or one step of the anchors. W must be
    even, and for steps so must W/2 and H.

    >>> x = torch.arange(8.0).view(1, 1, 2, 4)
    >>> pack(x, True).tolist()
    [[[[1.0, 3.0], [4.0, 6.0]]]]
    """
    if part is THIRD:
        return x[:, :, 1::2, ::2]
    if isinstance(part, Step):
        return pack(even_anchors(x), part is FIRST)
    pairs = x.unflatten(3, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.where(_even_rows(x), second, first) if part else torch.where(_even_rows(x), first, second)


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
    out, column = packed.new_zeros(*packed.shape[:3], 2 * packed.shape[3]), int(part)
    out[:, :, ::2, column::2] = packed[:, :, ::2]
    out[:, :, 1::2, 1 - column :: 2] = packed[:, :, 1::2]
    return out


def keep(x: Tensor, anchor: bool) -> Tensor:
    """Zero the other parity, keep the shape."""
    columns = torch.arange(x.shape[3], device=x.device)
    odd = (torch.arange(x.shape[2], device=x.device)[:, None] + columns) % 2 == 1
    return x * (odd == anchor)
