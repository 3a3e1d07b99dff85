"""Analysis and synthesis transforms, and their hyper counterparts.

`residual`: the MLIC family's (arXiv 2307.15421, and its code). `patch`: ours, for `fast`: space-to-depth by 8 first, so
that all work happens at 1/8 and 1/16 of the picture's size, beside a linear 16x16 block transform that starts as a DCT.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import PlainBlock, ResidualBlock, ResidualBlockDown, ResidualBlockUp, activated, conv, float32_region, subpel

LINEAR = ("g_a.linear", "g_s.linear")  # the block transforms of "patch", in a model


class ResidualAnalysis(nn.Sequential):
    """g_a of the MLIC family: picture (B, 3, H, W) in 0..1 -> y (B, M, H/16, W/16)."""

    def __init__(self, config: ModelConfig) -> None:
        n = config.width
        super().__init__(
            ResidualBlockDown(3, n),
            ResidualBlock(n),
            ResidualBlockDown(n, n),
            ResidualBlock(n),
            ResidualBlockDown(n, n),
            ResidualBlock(n),
            conv(n, config.latent_channels, stride=2),
        )


class ResidualSynthesis(nn.Sequential):
    """g_s of the MLIC family: y_hat (B, M, H/16, W/16) -> picture (B, 3, H, W)."""

    def __init__(self, config: ModelConfig) -> None:
        n, m = config.width, config.latent_channels
        super().__init__(
            ResidualBlock(m),
            ResidualBlockUp(m, n),
            ResidualBlock(n),
            ResidualBlockUp(n, n),
            ResidualBlock(n),
            ResidualBlockUp(n, n),
            ResidualBlock(n),
            subpel(n, 3),
        )


def block_dct(channels: int) -> Tensor:
    """Orthonormal 16x16 DCT-II of YCbCr for pixels laid out by `pixel_unshuffle(x, 16)`: (channels, 768).

    Rows run from low to high frequency; luma gets more of them, as its coefficients carry more.
    """
    k, n = np.arange(16)[:, None], np.arange(16)
    basis = np.cos(np.pi * (n + 0.5) * k / 16) * np.sqrt(2 / 16)
    basis[0] /= np.sqrt(2)
    colour = np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, 2.0], [1.0, -1.0, 0.0]])  # luma and two orthogonal differences
    colour /= np.linalg.norm(colour, axis=1, keepdims=True)
    rows = np.einsum("cp,ui,vj->cuvpij", colour, basis, basis).reshape(768, 768)
    luma_first = np.array([1, 2, 2])[:, None, None]
    order = np.argsort((luma_first * (1 + np.hypot(k, n))).ravel(), kind="stable")
    return torch.from_numpy(rows[order[:channels]]).float()


LATENT_GAIN = 8.0  # of the initial block transform: latents of a picture in -0.5..0.5 get a useful spread


# Factors that keep an optimiser's step small in pixel units: of the block transform's output, and of the nets' correction
BLOCK_SCALE, PIXEL_SCALE = 1 / 80, 0.03


class PatchAnalysis(nn.Module):
    """g_a of `fast`: picture (B, 3, H, W) in 0..1 and per-channel gain -> y (B, M, H/16, W/16)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, c, m = config.width, config.coarse_width, config.latent_channels
        self.linear = conv(768, m, kernel=1)
        self.head = conv(192, n)
        self.fine = nn.Sequential(*(PlainBlock(n) for _ in range(config.depth[0])))
        self.down = conv(n, c, stride=2)
        self.coarse = nn.Sequential(*(PlainBlock(c) for _ in range(config.depth[1])))
        self.tail = conv(c, m, kernel=1)
        with torch.no_grad():
            self.linear.weight.copy_(LATENT_GAIN * block_dct(m)[:, :, None, None])
            self.linear.bias.zero_()
            self.tail.weight.zero_()  # the nets start as a correction of nothing
            self.tail.bias.zero_()

    def forward(self, x: Tensor, feature_gain: Tensor) -> Tensor:
        x = x - 0.5
        features = self.fine(self.head(F.pixel_unshuffle(x, 8))) * feature_gain
        with float32_region(x):
            y = self.linear(F.pixel_unshuffle(x, 16))
        return y + self.tail(self.coarse(self.down(features)))


class PatchSynthesis(nn.Module):
    """g_s of `fast`: y_hat (B, M, H/16, W/16) and per-channel gain -> picture (B, 3, H, W)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, c, m = config.width, config.coarse_width, config.latent_channels
        self.linear = conv(m, 768, kernel=1)
        self.head = conv(m, c, kernel=1)
        self.coarse = nn.Sequential(*(PlainBlock(c) for _ in range(config.depth[1])))
        self.up = subpel(c, n, kernel=1)
        self.fine = nn.Sequential(*(PlainBlock(n) for _ in range(config.depth[0])))
        self.tail = conv(n, 192)
        with torch.no_grad():
            self.linear.weight.copy_(block_dct(m).T[:, :, None, None] / (LATENT_GAIN * BLOCK_SCALE))
            self.linear.bias.zero_()
            self.head.weight.mul_(1 / LATENT_GAIN)
            self.tail.weight.zero_()
            self.tail.bias.zero_()

    def forward(self, y_hat: Tensor, feature_gain: Tensor) -> Tensor:
        features = self.fine(self.up(self.coarse(self.head(y_hat))) * feature_gain)
        with float32_region(y_hat):
            x = BLOCK_SCALE * F.pixel_shuffle(self.linear(y_hat), 16)
        return x + PIXEL_SCALE * F.pixel_shuffle(self.tail(features), 8) + 0.5


def hyper_analysis(config: ModelConfig) -> nn.Sequential:
    """h_a: y (B, M, H/16, W/16) -> z (B, z_channels, H/64, W/64)."""
    m, n, act = config.latent_channels, config.z_channels, config.activation
    if config.transform == "patch":
        layers = [conv(m, n), conv(n, n, stride=2), conv(n, n, stride=2)]
    else:
        layers = [conv(m, n), conv(n, n), conv(n, n, stride=2), conv(n, n), conv(n, n, stride=2)]
    return activated(layers, act)


def hyper_synthesis(config: ModelConfig) -> nn.Sequential:
    """h_s: z_hat (B, z_channels, H/64, W/64) -> Phi_h (B, phi_h_channels, H/16, W/16)."""
    m, n, out, act = config.latent_channels, config.z_channels, config.phi_h_channels, config.activation
    if config.transform == "patch":
        half = out // 2
        layers = [conv(n, n), subpel(n, n, kernel=1), conv(n, half), subpel(half, half, kernel=1), conv(half, out)]
    else:
        mid = m * 3 // 2
        layers = [conv(n, m), subpel(m, m), conv(m, mid), subpel(mid, mid), conv(mid, out)]
    return activated(layers, act)
