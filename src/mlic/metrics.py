"""How far a decoded picture is from the original: PSNR and MS-SSIM."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_TAPS, _SIGMA = 11, 1.5  # the Gaussian window
_K1, _K2 = 0.01, 0.03  # stabilise the luminance and the contrast-structure ratio, relative to the data range
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponent of each scale, finest first

MS_SSIM_MIN_SIDE = (_TAPS - 1) * 2 ** (len(_WEIGHTS) - 1) + 1
"""Smallest picture side, in pixels, whose coarsest MS-SSIM scale still holds the Gaussian window (161)."""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two (H, W, C) uint8 pictures, of one mean squared error over pixels and channels;
    `inf` where they are equal. Raises ValueError where shapes or types do not fit.

    >>> grey = np.full((4, 4, 3), 100, np.uint8)
    >>> round(psnr(grey, grey + 1), 2)
    48.13
    """
    _check_pictures(a, b)
    mse = float(np.mean(np.square(a.astype(np.float32) - b), dtype=np.float64))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Multi-scale structural similarity of two (H, W, C) uint8 pictures, in 0..1; 1 means equal.

    Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment" (Asilomar 2003), with
    the paper's five scales and weights, an 11-tap Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, and the mean of
    the channels' values as the picture's. Raises ValueError where shapes or types do not fit, or a side is too small.

    >>> rows = np.tile(np.arange(176, dtype=np.uint8)[:, None, None], (1, 176, 3))
    >>> round(ms_ssim(rows, rows), 6), ms_ssim(rows, rows // 16 * 16) < 0.99
    (1.0, True)
    """
    import torch

    _check_pictures(a, b)
    # One channel at a time, as (1, 1, H, W): a third of the memory on a large photograph.
    channels = [[torch.tensor(p[None, None, :, :, c], dtype=torch.float64) for p in (a, b)] for c in range(a.shape[2])]
    with torch.no_grad():
        values = [float(ms_ssim_tensor(x, y, 255.0)) for x, y in channels]
    return min(sum(values) / len(values), 1.0)


def ms_ssim_tensor(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Differentiable MS-SSIM of two float (B, C, H, W) batches: a scalar, the mean over batch and channels. `data_range` is
    the largest minus the smallest value a pixel can take. Parameters and errors are those of `ms_ssim`.

    It is computed in at least float32, whatever the autocast mode. A channel that is anticorrelated at some scale
    counts as 0 and passes no gradient.
    """
    import torch
    import torch.nn.functional as F

    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"need two BCHW tensors of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(x.shape[-2:]) < MS_SSIM_MIN_SIDE:
        raise ValueError(f"MS-SSIM needs sides of at least {MS_SSIM_MIN_SIDE} pixels, got {x.shape[-2]} x {x.shape[-1]}")
    if not x.is_floating_point() or not y.is_floating_point():
        raise ValueError(f"need float tensors, got {x.dtype} and {y.dtype}; convert with .float()")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    offsets = torch.arange(_TAPS, device=x.device, dtype=dtype) - _TAPS // 2
    window = torch.softmax(-(offsets**2) / (2 * _SIGMA**2), 0)
    # The five moments share one depthwise convolution; depthwise also keeps CUDA from rounding to TF32, which the
    # subtraction of squares below would not survive.
    groups = 5 * x.shape[1]
    vertical = window.view(1, 1, -1, 1).repeat(groups, 1, 1, 1)
    horizontal = window.view(1, 1, 1, -1).repeat(groups, 1, 1, 1)

    result = torch.ones((), device=x.device, dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        for scale, weight in enumerate(_WEIGHTS):
            if scale:  # halve, with one line of zeros on both sides of an odd length
                padding = [side % 2 for side in x.shape[-2:]]
                x, y = F.avg_pool2d(x, 2, padding=padding), F.avg_pool2d(y, 2, padding=padding)
            moments = torch.cat([x, y, x * x, y * y, x * y], 1).contiguous()
            moments = F.conv2d(F.conv2d(moments, vertical, groups=groups), horizontal, groups=groups)
            mean_x, mean_y, xx, yy, xy = moments.chunk(5, 1)
            similarity = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
            if scale == len(_WEIGHTS) - 1:  # the luminance term enters at the coarsest scale only
                similarity = similarity * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            value = similarity.mean((2, 3))
            result = result * value.clamp(min=1e-6) ** weight * (value > 0)  # the clamp keeps the gradient finite
    return result.mean()


def ms_ssim_db(value: float) -> float:
    """MS-SSIM on a decibel scale, ``-10 log10(1 - value)``, which spreads out the values near 1; 1 gives ``inf``.

    >>> round(ms_ssim_db(0.99), 3)
    20.0
    """
    return -10 * math.log10(1 - value) if value < 1 else math.inf


def _check_pictures(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 3 or a.size == 0:
        raise ValueError(f"need two non-empty HWC pictures of one shape, got shapes {a.shape} and {b.shape}")
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"need uint8 pictures (0..255), got {a.dtype} and {b.dtype}; round and convert first")
