"""Muon: momentum made orthogonal before it is subtracted, for the weight matrices of convolutions and linear layers.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale of a step follows Liu et al.,
"Muon is scalable for LLM training" (2025). Nothing here waits for the device.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from .branches import Branches
from .transforms import LINEAR

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the published quintic, applied five times
ROOT_MEAN_SQUARE = 0.2  # of a step's elements at a learning rate of 1, as Adam's steps have


def matrix_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the networks' convolutions and linear layers: not depthwise ones, nor the linear 16x16 transforms."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "groups", 1) == 1 and name not in LINEAR
    ]


def orthogonal(x: Tensor, *, half: bool = False) -> Tensor:
    """Each matrix with all its singular values brought to between about 0.7 and 1.2: (n, short, long) -> the same. Rows and
    columns of zeros stay so. `half`: by products in bfloat16.
    """
    wide = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    if half:
        wide = wide.bfloat16()
    first, second, third = NEWTON_SCHULZ
    for _ in range(5):
        square = wide @ wide.mT
        factor = torch.baddbmm(square, square, square, beta=second, alpha=third)
        wide = torch.baddbmm(wide, factor, wide, beta=first)
    return wide.to(x.dtype)


def channels_last(x: Tensor) -> Tensor:
    """The weight of a convolution as (outputs, rows, columns, inputs), which is how GPUs keep it; others as they are."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def padded(parameter: nn.Parameter) -> tuple[int, int]:
    """The (short, long) to which a parameter's matrix, lying down, is filled up with zeros; similar ones have the same."""
    short, long = sorted(parameter.flatten(1).shape)
    steps = (n for power in itertools.count() for n in (384 << 2 * power, 1152 << 2 * power, 2304 << 2 * power))
    return -(-short // 128) * 128, next(n for n in steps if n >= long)


class Layout:
    """The padded matrices of a group of parameters as one vector, so that few kernels take gradients into it and steps out;
    those of one size lie together, (n, short, long), and one product serves all of them.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = sorted(parameters, key=padded)
        self.shapes = [(len(list(same)), *size) for size, same in itertools.groupby(self.parameters, key=padded)]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        device, counts = parameters[0].device, [p.numel() for p in self.parameters]
        places = torch.arange(sum(self.sizes), device=device)
        self.source = torch.full_like(places, sum(counts))  # of each element, in the gradients; past their end: nothing
        for view, numbers in zip(self.views(self.source), torch.arange(sum(counts), device=device).split(counts)):
            view.copy_(numbers.view(view.shape))
        self.place = torch.cat([view.flatten() for view in self.views(places)])  # of each element of the gradients
        self.momentum = torch.zeros(len(places), device=device)
        factors = torch.tensor([max(p.flatten(1).shape) ** 0.5 for p in self.parameters], device=device)[:, None, None]
        self.factors = factors.split([number for number, _, _ in self.shapes])

    def filled(self, vector: Tensor) -> list[Tensor]:
        """The vector -> (n, short, long) for each size, as views."""
        return [part.view(shape) for part, shape in zip(vector.split(self.sizes), self.shapes)]

    def views(self, vector: Tensor) -> list[Tensor]:
        """The vector -> each parameter's part of it, in the shape of `channels_last(parameter)`."""
        parts = []
        for matrix, p in zip(itertools.chain(*self.filled(vector)), self.parameters):
            rows, columns = p.flatten(1).shape
            part = matrix[:rows, :columns] if rows <= columns else matrix[:columns, :rows].mT
            parts.append(part.unflatten(1, channels_last(p).shape[1:]))
        return parts

    def gradient(self) -> Tensor:
        flat = [channels_last(p.grad).flatten() for p in self.parameters]
        return torch.cat([*flat, flat[0].new_zeros(1)])[self.source]

    def add(self, vector: Tensor) -> None:
        """Add to the parameters what is for them in a vector."""
        parts = vector[self.place].split([p.numel() for p in self.parameters])
        own = [channels_last(p) for p in self.parameters]
        torch._foreach_add_(own, [part.view(p.shape) for part, p in zip(parts, own)])


class Muon(torch.optim.Optimizer):
    """`params`: parameters, or groups of them, of two or more dimensions; the first is a matrix's rows, the rest are
    its columns. Where the tensor `found_inf` is 1, a step leaves everything as it was. Buckets take turns on `branches`;
    `half`: products in bfloat16. Each step also takes `lr` times `weight_decay` of the parameters away.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 4e-4,
        *,
        weight_decay: float = 0.0,
        half: bool = False,
        branches: Branches = Branches(),
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.weight_decay, self.half, self.branches = weight_decay, half, branches
        first = self.param_groups[0]["params"][0]
        self.found_inf = torch.zeros((), device=first.device)
        self._layouts: list[Layout] = []  # of each group; made in the first step, from the state if there is one

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._layouts = []

    def _lay_out(self) -> None:
        for group in self.param_groups:
            layout = Layout(group["params"])
            for p, view in zip(layout.parameters, layout.views(layout.momentum)):
                if self.state[p]:
                    view.copy_(self.state[p]["momentum"])
                self.state[p]["momentum"] = view
            self._layouts.append(layout)

    @torch.no_grad()
    def step(self) -> None:
        if not self._layouts:
            self._lay_out()
        keep = 1 - self.found_inf
        for group, layout in zip(self.param_groups, self._layouts):
            gradient = layout.gradient().where(keep > 0, 0)
            momentum = layout.momentum.lerp(gradient, 1 - MOMENTUM)
            towards = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
            layout.momentum.lerp_(momentum, keep)
            steps = []
            for filled, factor in zip(layout.filled(towards), layout.factors):
                with self.branches.branch():
                    steps.append((orthogonal(filled, half=self.half) * factor).flatten())
            self.branches.join()
            if self.weight_decay:
                torch._foreach_mul_(layout.parameters, 1 - group["lr"] * keep * self.weight_decay)
            layout.add(torch.cat(steps) * (group["lr"] * keep * -ROOT_MEAN_SQUARE))
