"""The two halves of a latent plane.

Anchors sit where (row + column) is odd, non-anchors where it is even, as in the MLIC family. A half is kept packed,
(B, C, H, W) -> (B, C, H, W/2): what is needed at one parity alone is computed on half the positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _even_rows(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[2], device=x.device) % 2 == 0)[:, None]


def pack(x: Tensor, anchor: bool) -> Tensor:
    """Keep one parity: (B, C, H, W) -> (B, C, H, W/2). W must be even.

    >>> x = torch.arange(8.0).view(1, 1, 2, 4)
    >>> pack(x, True).tolist()
    [[[[1.0, 3.0], [4.0, 6.0]]]]
    """
    pairs = x.unflatten(3, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.where(_even_rows(x), second, first) if anchor else torch.where(_even_rows(x), first, second)


def unpack(half: Tensor, anchor: bool) -> Tensor:
    """Undo `pack`, with zeros at the other parity: (B, C, H, W/2) -> (B, C, H, W).

    >>> unpack(torch.ones(1, 1, 2, 2), False).tolist()
    [[[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]]]
    """
    out, column = half.new_zeros(*half.shape[:3], 2 * half.shape[3]), int(anchor)
    out[:, :, ::2, column::2] = half[:, :, ::2]
    out[:, :, 1::2, 1 - column :: 2] = half[:, :, 1::2]
    return out


def keep(x: Tensor, anchor: bool) -> Tensor:
    """Zero the other parity, keep the shape."""
    columns = torch.arange(x.shape[3], device=x.device)
    odd = (torch.arange(x.shape[2], device=x.device)[:, None] + columns) % 2 == 1
    return x * (odd == anchor)
