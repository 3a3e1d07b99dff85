"""The references of a multi-reference entropy model: channel, local and global contexts, and what reads them.

Sources: Jiang et al., "MLIC", ACM MM 2023, section 3 (arXiv 2211.07273); MLIC++, arXiv 2307.15421 (linear attention).
Every part takes and gives (B, channels, H, W) unless it says otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkerboard import QUARTERS, THIRD, Step, even_anchors, keep, pack, unpack
from .config import ANCHOR, NON_ANCHOR, AttentionConfig
from .layers import activated, conv
from .prior import LevelTable


class ConvStack(nn.Sequential):
    """Convolutions with an activation between each two: the channel context, LRP, entropy and local conv nets."""

    def __init__(self, *channels: int, kernels: tuple[int, ...], act: str) -> None:
        super().__init__(*activated([conv(a, b, kernel=kernel) for a, b, kernel in zip(channels, channels[1:], kernels)], act))

    def silenced(self) -> ConvStack:
        """With a last layer of zeros: it begins with nothing to say, and learns to."""
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)
        return self


class AnchorSteps(nn.Module):
    """What anchors say of each other. Anchors see nothing of their slice; where they are coded in three steps
    (checkerboard.py), the nets of SECOND and THIRD add to their entropy parameters what the steps before tell. After the
    quadtree partition of Li, Li and Lu (CVPR 2023), here inside one half of one slice.
    """

    def __init__(self, channels: int, hidden: int, act: str) -> None:
        super().__init__()
        self.second, self.third = (
            ConvStack(3 * channels, hidden, hidden, 2 * channels, kernels=(3, 1, 1), act=act).silenced() for _ in range(2)
        )

    def forward(self, step: Step, parameters: Tensor, before: Tensor) -> Tensor:
        """Entropy parameters (B, 2C, H, W) as known so far, the steps before (B, C, H, W) -> what to add, packed."""
        if step is THIRD:
            return pack(self.third(torch.cat([parameters, before], 1)), THIRD)
        return pack(self.second(torch.cat([even_anchors(parameters), even_anchors(before)], 1)), NON_ANCHOR)


class HyperContext(nn.Module):
    """What the quarters of z say of each other. The factorised prior has the first; each of the others has Gaussians around
    its medians, from a net that sees the quarters before it and, in an offset of its inputs, the quality.
    """

    def __init__(self, channels: int, hidden: int, levels: int, act: str) -> None:
        super().__init__()
        self.offset = LevelTable(torch.zeros(levels, channels)) if levels else None
        self.nets = nn.ModuleList(
            ConvStack(channels, hidden, hidden, 2 * channels, kernels=(3, 1, 1), act=act).silenced() for _ in QUARTERS[1:]
        )


class SoftmaxAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V over positions, fused: O(L) memory. (B, C, L) x 3 -> (B, C, L)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # (B, h, L, d), contiguous: torch's fused kernel asks for it, and the plain one needs O(L^2) memory
        q, k, v = (x.unflatten(1, (self.heads, -1)).transpose(2, 3).contiguous() for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)


class LinearAttention(nn.Module):
    """(softmax_L(K) V^T)^T softmax_d(Q): O(L) time and memory (Shen et al. 2021). (B, C, L) x 3 -> (B, C, L)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (self.heads, -1)) for x in (query, key, value))  # (B, h, d, L)
        context = k.softmax(3) @ v.transpose(2, 3)  # (B, h, d, d)
        return (context.transpose(2, 3) @ q.softmax(2)).flatten(1, 2)


ATTENTION = {"softmax": SoftmaxAttention, "linear": LinearAttention}


class Projection(nn.Sequential):
    """conv1x1 then depthwise conv3x3: one of an attention's queries, keys, values."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(conv(inputs, outputs, kernel=1), conv(outputs, outputs, groups=outputs))


class DepthwiseMLP(nn.Sequential):
    """conv1x1, act, depthwise conv3x3, act, conv1x1."""

    def __init__(self, inputs: int, hidden: int, outputs: int, act: str) -> None:
        layers = [conv(inputs, hidden, kernel=1), conv(hidden, hidden, groups=hidden), conv(hidden, outputs, kernel=1)]
        super().__init__(*activated(layers, act))


class IntraSliceContext(nn.Module):
    """Global context inside a slice (section 3.4): how the previous slice's non-anchors relate to its anchors, applied
    to the anchors of this slice. Gives 2 * slice channels.
    """

    def __init__(self, previous: int, channels: int, config: AttentionConfig, act: str) -> None:
        super().__init__()
        width = config.width or channels
        self.queries = Projection(previous, width)
        self.keys = Projection(previous, width)
        self.values = Projection(channels, width)
        self.attention = ATTENTION[config.kind](config.heads or 2)
        self.reprojection = conv(width, 2 * channels, kernel=config.reprojection_kernel)
        self.mlp = DepthwiseMLP(2 * channels, config.expansion * channels, 2 * channels, act)

    def forward(self, previous: Tensor, anchors: Tensor) -> Tensor:
        """previous: the finished slice before; anchors: this slice with zeros at non-anchors."""
        query = pack(self.queries(keep(previous, NON_ANCHOR)), NON_ANCHOR)
        key = pack(self.keys(keep(previous, ANCHOR)), ANCHOR)
        value = pack(self.values(anchors), ANCHOR)
        attended = self.attention(query.flatten(2), key.flatten(2), value.flatten(2))
        x = self.reprojection(unpack(attended.unflatten(2, query.shape[2:]), NON_ANCHOR))
        return x + self.mlp(x)


class InterSliceContext(nn.Module):
    """Global context across slices (section 3.4): attention over all positions of the finished slices.

    Gives 2 * slice channels.
    """

    def __init__(self, previous: int, channels: int, config: AttentionConfig, act: str) -> None:
        super().__init__()
        width = config.width or previous
        self.queries = Projection(previous, width)
        self.keys = Projection(previous, width)
        self.values = Projection(previous, width)
        self.attention = ATTENTION[config.kind](config.heads or width // 32)
        self.reprojection = conv(width, 3 * channels, kernel=config.reprojection_kernel)
        self.mlp = DepthwiseMLP(3 * channels, config.expansion * channels, 2 * channels, act)
        self.skip = conv(3 * channels, 2 * channels, kernel=1)

    def forward(self, previous: Tensor) -> Tensor:
        query, key, value = self.queries(previous), self.keys(previous), self.values(previous)
        attended = self.attention(query.flatten(2), key.flatten(2), value.flatten(2))
        x = self.reprojection(attended.unflatten(2, previous.shape[2:]))
        return self.mlp(x) + self.skip(x)


class WindowAttention(nn.Module):
    """Attention inside small windows, with a bias on the scores. (B, L, heads, n, d) x 3 -> the same."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


class HalfTanh(nn.Module):
    """0.5 tanh(x): what the latent residual prediction adds at most."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x.tanh()


class WindowContext(nn.Module):
    """Overlapped-window checkerboard attention (section 3.3): a 5x5 window around each position attends within itself
    and is folded to one vector. Only non-anchor windows are computed; anchor positions of the output are zero.

    Only pairs of anchors inside the picture attend; other pairs get -100. Gives 2 * slice channels.
    """

    WINDOW, HEADS = 5, 2

    def __init__(self, channels: int) -> None:
        super().__init__()
        window, self.head_dim = self.WINDOW, channels // self.HEADS
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.relative_position = nn.Parameter(torch.zeros((2 * window - 1) ** 2, self.HEADS))
        nn.init.trunc_normal_(self.relative_position, std=0.02)
        self.attention = WindowAttention()
        self.fusion = nn.Conv2d(channels, 2 * channels, window)
        self.proj = nn.Linear(2 * channels, 2 * channels)
        self.norm2 = nn.LayerNorm(2 * channels)
        self.mlp = nn.Sequential(nn.Linear(2 * channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, 2 * channels))

    def _windows(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 25, C, L) around the L non-anchor positions
        window = self.WINDOW
        padded = F.pad(x, (window // 2,) * 4)
        taps = [padded[:, :, i : i + x.shape[2], j : j + x.shape[3]] for i in range(window) for j in range(window)]
        return torch.stack([pack(tap, NON_ANCHOR) for tap in taps], 1).flatten(3)

    def _bias(self, x: Tensor) -> Tensor:  # -> (L, heads, 25, 25) to add to the scores
        window = self.WINDOW
        places = torch.arange(window**2, device=x.device)
        rows, columns = places // window + window - 1, places % window + window - 1
        index = (rows[:, None] - places // window) * (2 * window - 1) + columns[:, None] - places % window
        position = self.relative_position[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)
        anchor = self._windows(keep(torch.ones_like(x[:1, :1]), ANCHOR))[0, :, 0].T > 0  # (L, 25); padding is none
        return position + torch.where(anchor[:, None, :, None] & anchor[:, None, None, :], 0.0, -100.0)

    def forward(self, anchors: Tensor) -> Tensor:
        batch, _, height, width = anchors.shape
        qkv = self.qkv(self.norm1(anchors.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        heads = self._windows(qkv).unflatten(2, (3, self.head_dim, self.HEADS))  # (B, 25, 3, d, heads, L)
        q, k, v = heads.permute(2, 0, 5, 4, 1, 3)  # each (B, L, heads, 25, d)
        x = self.attention(q, k, v, self._bias(anchors))
        x = x.transpose(3, 4).flatten(2, 3).unflatten(3, (self.WINDOW, self.WINDOW))  # (B, L, heads * d, 5, 5)
        x = self.proj(self.fusion(x.flatten(0, 1)).flatten(1).unflatten(0, (batch, -1)))
        x = x + self.mlp(self.norm2(x))
        return unpack(x.unflatten(1, (height, width // 2)).permute(0, 3, 1, 2), NON_ANCHOR)


def local_context(kind: str, channels: int, act: str) -> nn.Module:
    """Local spatial context of the anchor-only slice; gives 2 * slice channels."""
    if kind == "window":
        return WindowContext(channels)
    if kind == "conv":  # MLIC: stacked checkerboard convolutions
        return ConvStack(channels, channels, channels, 2 * channels, kernels=(5, 5, 5), act=act)
    return ConvStack(channels, channels, 2 * channels, kernels=(3, 3), act=act)
