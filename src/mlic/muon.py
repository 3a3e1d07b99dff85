"""Muon: momentum made orthogonal before it is subtracted, for the weight matrices of convolutions and linear layers.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale of a step follows Liu et al.,
"Muon is scalable for LLM training" (2025). Nothing here waits for the device.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the published quintic, applied five times
ROOT_MEAN_SQUARE = 0.2  # of a step's elements at a learning rate of 1, as Adam's steps have


def matrix_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the networks' convolutions and linear layers: not depthwise ones, nor the linear 16x16 transforms."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        and getattr(module, "groups", 1) == 1
        and name not in ("g_a.linear", "g_s.linear")
    ]


def orthogonal(x: Tensor) -> Tensor:
    """Each matrix with all its singular values brought to between about 0.7 and 1.2: (n, rows, columns) -> the same."""
    wide = x.mT if x.shape[1] > x.shape[2] else x
    wide = wide / (torch.linalg.matrix_norm(wide)[:, None, None] + 1e-7)
    if x.is_cuda:
        wide = wide.bfloat16()
    first, second, third = NEWTON_SCHULZ
    for _ in range(5):
        square = wide @ wide.mT
        wide = first * wide + (second * square + third * square @ square) @ wide
    return (wide.mT if x.shape[1] > x.shape[2] else wide).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """`params`: parameters, or groups of them, of two or more dimensions; the first is a matrix's rows, the rest are
    its columns. Where the tensor `found_inf` is 1, a step leaves everything as it was.
    """

    def __init__(self, params, lr: float | Tensor = 4e-4) -> None:
        super().__init__(params, {"lr": lr})
        first = self.param_groups[0]["params"][0]
        self.found_inf = torch.zeros((), device=first.device)

    @torch.no_grad()
    def step(self) -> None:
        keep = 1 - self.found_inf
        for group in self.param_groups:
            in_order = sorted(group["params"], key=lambda p: p.flatten(1).shape)
            for (rows, columns), same in itertools.groupby(in_order, key=lambda p: p.flatten(1).shape):
                parameters = list(same)  # of equal shape: one batched product serves all
                for p in parameters:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros(rows, columns, device=p.device)
                averages = [self.state[p]["momentum"] for p in parameters]
                gradient = torch.stack([p.grad.flatten(1) for p in parameters]).where(keep > 0, 0)
                momentum = torch.stack(averages).lerp(gradient, 1 - MOMENTUM)
                update = orthogonal(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
                update *= group["lr"] * keep * (ROOT_MEAN_SQUARE * max(rows, columns) ** 0.5)
                for p, average, new, change in zip(parameters, averages, momentum, update):
                    average.lerp_(new, keep)
                    p.sub_(change.view(p.shape))
