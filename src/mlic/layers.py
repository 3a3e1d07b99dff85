"""Building blocks shared by the transforms and the entropy model."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)


def subpel(inputs: int, outputs: int, *, kernel: int = 3) -> nn.Sequential:
    """Sub-pixel convolution: (B, inputs, H, W) -> (B, outputs, 2H, 2W)."""
    return nn.Sequential(conv(inputs, 4 * outputs, kernel=kernel), nn.PixelShuffle(2))


LEAK = 1 / 8  # slope of "leaky" below zero: a power of two, for exact arithmetic


def activation(name: str) -> nn.Module:
    return {"gelu": nn.GELU, "relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(LEAK)}[name]()


def activated(layers: list[nn.Module], act: str) -> nn.Sequential:
    """Layers with an activation between each two."""
    spaced = [module for layer in layers for module in (layer, activation(act))]
    return nn.Sequential(*spaced[:-1])


def float32_region(x: Tensor) -> contextlib.AbstractContextManager:
    """Outside autocast on x's device: for probabilities, and for latents that lose their integers in bfloat16."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def has_bfloat16(device: torch.device) -> bool:
    """Has it units for bfloat16? Devices without them compute in it all the same, many times slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    there = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return there and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not where ONEDNN_MAX_CPU_ISA forbids it


class _Bounded(torch.autograd.Function):
    """Clamping whose gradient still lets values out of bounds move back in (Balle et al. 2018)."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        inside = (x >= low) | (grad < 0)
        return grad * (inside if math.isinf(high) else inside & ((x <= high) | (grad > 0))), None, None


def bounded(x: Tensor, low: float, high: float = math.inf) -> Tensor:
    return _Bounded.apply(x, low, high) if x.requires_grad else x.clamp(low, high)


class GDN(nn.Module):
    """Generalised divisive normalisation, or its inverse: x / sqrt(beta + gamma x^2) (Balle et al., ICLR 2016).

    beta and gamma are stored as square roots with a pedestal of 2^-36 and bounded from below.
    """

    PEDESTAL = 2.0**-36
    BETA_MIN = 1e-6

    def __init__(self, channels: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter((torch.ones(channels) + self.PEDESTAL).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(channels) + self.PEDESTAL).sqrt())

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        beta = bounded(self.beta, (self.BETA_MIN + self.PEDESTAL) ** 0.5) ** 2 - self.PEDESTAL
        gamma = bounded(self.gamma, self.PEDESTAL**0.5) ** 2 - self.PEDESTAL
        norm = F.conv2d(x * x, gamma[:, :, None, None], beta)
        return x * norm.sqrt() if self.inverse else x * norm.rsqrt()


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels)
        self.conv2 = conv(channels, channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.act(self.conv1(x)))) + x


class ResidualBlockDown(nn.Module):
    """Stride-2 residual block closed by a GDN: (B, inputs, H, W) -> (B, outputs, H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=2)
        self.conv2 = conv(outputs, outputs)
        self.act = nn.GELU()
        self.gdn = GDN(outputs)
        self.skip = conv(inputs, outputs, kernel=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.gdn(self.conv2(self.act(self.conv1(x)))) + self.skip(x)


class ResidualBlockUp(nn.Module):
    """x2 residual block closed by an inverse GDN: (B, inputs, H, W) -> (B, outputs, 2H, 2W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.subpel = subpel(inputs, outputs)
        self.conv = conv(outputs, outputs)
        self.act = nn.GELU()
        self.igdn = GDN(outputs, inverse=True)
        self.skip = subpel(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.igdn(self.conv(self.act(self.subpel(x)))) + self.skip(x)


class PlainBlock(ResidualBlock):
    """The residual block of `fast`: no activation after the second convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.conv1(x)))
