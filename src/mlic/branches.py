"""Parts of a training step that need not wait for each other, on streams of their own.

At small batches a step on a GPU is a chain of thousands of small kernels, each of which leaves most of the device idle. In
a captured graph, what was put on other streams becomes a branch that runs beside the chain: the gradients of weights,
which nothing waits for before the optimiser does, and the optimiser's own products.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Branches:
    """`count` streams of a CUDA device; with none, on the CPU too, everything runs where it stands."""

    def __init__(self, count: int = 0) -> None:
        self.streams = [torch.cuda.Stream() for _ in range(count)]
        self.turn = 0

    @contextlib.contextmanager
    def branch(self, *used: Tensor):
        """Put what is computed inside on the next stream, after all that the current one was given so far. `used`: tensors
        of the current stream that may be freed there before `join`.
        """
        if not self.streams:
            yield
            return
        self.turn = (self.turn + 1) % len(self.streams)
        stream = self.streams[self.turn]
        stream.wait_stream(torch.cuda.current_stream())
        for tensor in used:
            tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for all branches."""
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)


class _Convolution(torch.autograd.Function):
    """A 2-d convolution; the gradients of weight and bias come from a branch, and are there after its `join`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, settings: tuple, branches: Branches) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.branches = settings, branches
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        rest = (None, stride, padding, dilation, False, (0, 0), groups)
        with ctx.branches.branch(grad, x):
            by_weight = torch.ops.aten.convolution_backward(grad, x, weight, *rest, (False, True, False))[1]
            by_bias = grad.sum((0, 2, 3))
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = torch.ops.aten.convolution_backward(grad, x, weight, *rest, (True, False, False))[0]
        return by_x, by_weight, by_bias, None, None


def branch_convolutions(model: nn.Module, names: set[str], branches: Branches) -> None:
    """Let the convolutions of these names in a model compute their gradients so. Whoever reads these gradients calls
    `branches.join` first.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name in names:
            settings = (module.stride, module.padding, module.dilation, module.groups)
            module._conv_forward = lambda x, weight, bias, settings=settings: _Convolution.apply(
                x.to(weight.dtype), weight, bias, settings, branches
            )
