"""Where the weights of a training run begin, and how fast each of them learns.

Adam moves every weight by about the learning rate a step, all weights of a sum together, so a unit that sums n inputs
moves n times as far: a weight's rate falls with the number of inputs of its sum (Yang et al. 2022, "Tensor Programs V",
table 8). Muon's steps need no such care. The nets of the entropy model begin with signals that keep their size (He et al.
2015).
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .model import CompressionModel, level_lambda, log_lambda_level
from .prior import LevelTable
from .transforms import LINEAR

INPUTS = 192  # sums of more inputs than this learn more slowly
# relative to the run's learning rate, by the beginning of a parameter's name; the first that fits
PARTS = (("prior.", 8.0), ("gains.phi_h.", 1.0), ("gains.", 4.0), ("", 1.0))


def relative_rate(name: str, parameter: Tensor, *, matrix: bool = False) -> float:
    """Learning rate of a parameter of a CompressionModel relative to the run's. `matrix`: under Muon, whose steps do not
    grow with the sum.

    >>> relative_rate("h_s.0.weight", torch.empty(128, 128, 3, 3))
    0.16666666666666666
    """
    rate = next(rate for part, rate in PARTS if name.startswith(part))
    if parameter.ndim == 4 and not matrix and not name.startswith(LINEAR):  # these begin as a DCT: small sums of large terms
        rate *= min(1.0, INPUTS / parameter[0].numel())
    return rate


@torch.no_grad()
def start(model: nn.Module) -> None:
    """Draw the weights of the hyper transforms and entropy nets anew: variance 2 / inputs, 1 / inputs where no ReLU
    follows, biases zero. What begins as zeros stays so; what the nets say of the latent begins near nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith(("g_a.", "g_s.")) and module.weight.any():
            inputs = module.weight[0].numel()
            plain = any(part in name for part in ("queries", "keys", "values"))
            nn.init.normal_(module.weight, std=math.sqrt((1 if plain else 2) / inputs))
            module.bias.zero_()
    model.h_a[-1].weight.mul_(0.5)
    for nets in model.entropy_model.slices:
        for net in (nets.parameters_anchor, nets.parameters_non_anchor):
            net[-1].weight.mul_(0.1)


@torch.no_grad()
def begin_from(model: CompressionModel, given: CompressionModel) -> None:
    """Copy the weights of a model of the same shape. `given` may also

    - lack the contexts of z, the steps of the anchors, the shifts of values, or the last blocks of the "patch" transforms:
      these begin with nothing to add, but z with other densities, and values with the shifts of dependent.py;
    - lack the last slices, with "patch" transforms: they begin with means of zero and small scales, and nothing but their
      own nets and the linear branches looks at them at first;
    - have global contexts that `model` does without, which are left out;
    - have another `error_bits`, `dependent` or lambda range: a level begins as the one that had its lambda there; beyond the
      range, as the line through the outermost eighth goes on.

    Raises ValueError for any other difference.
    """
    given, slices = copy.deepcopy(given), given.config.slices
    free = {field: getattr(model.config, field) for field in ("lambda_range", "error_bits", "dependent")}
    if model.config.transform == "patch":
        free["slices"] = model.config.slices
    lacking = [name for name in ("hyper_hidden", "step_hidden", "shifted") if not getattr(given.config, name)]
    free |= {name: getattr(model.config, name) for name in lacking}
    if all(before <= now for before, now in zip(given.config.depth, model.config.depth)):
        free["depth"] = model.config.depth
    absent = {name for name in ("intra", "inter") if getattr(model.config, name) is None}
    free |= dict.fromkeys(absent)
    if dataclasses.replace(given.config, **free) != model.config or model.config.slices[: len(slices)] != slices:
        raise ValueError(f"the weights to begin from are of another shape ({given.config.name!r})")
    if given.config.lambda_range != model.config.lambda_range:
        _move_levels(given, model.config)
    _leave_out(given, absent)
    own, had = model.state_dict(), given.state_dict()
    for name, value in had.items():
        if name in ("h_a.0.weight", "g_s.head.weight"):
            own[name].zero_()
        own[name][tuple(slice(size) for size in value.shape)] = value
    for name, value in own.items():
        if ".conv2." in name and name not in had:
            value.zero_()  # of a new block, which then adds nothing
    small = -1.5 if model.config.scale_form == "log" else 0.2
    for nets in model.entropy_model.slices[len(slices) :]:
        for net in (nets.parameters_anchor, nets.parameters_non_anchor):
            net[-1].weight.zero_()
            net[-1].bias.copy_(torch.tensor([small, 0.0]).repeat_interleave(len(net[-1].bias) // 2))


def _leave_out(given: CompressionModel, contexts: set[str]) -> None:
    """Take the global contexts of these names, "intra" and "inter", out of `given`, with the inputs that they feed."""
    for nets, channels in zip(given.entropy_model.slices, given.config.slices):
        for net, before in ((nets.parameters_anchor, []), (nets.parameters_non_anchor, ["local", "intra"])):
            fed = [name for name in (*before, "inter") if getattr(nets, name) is not None]  # 2 * channels each, in this order
            kept = torch.tensor([name not in contexts for name in fed], dtype=torch.bool).repeat_interleave(2 * channels)
            weight = net[0].weight
            net[0].weight = nn.Parameter(weight[:, F.pad(kept, (0, weight.shape[1] - len(kept)), value=True)])
        for name in contexts:
            setattr(nets, name, None)


def _move_levels(given: CompressionModel, config: ModelConfig) -> None:
    """Let the level tables of `given` say what they say of each lambda at the level where `config` has it."""
    levels = torch.arange(config.quality_levels, dtype=torch.float32)
    last = len(levels) - 1
    at = log_lambda_level(given.config, level_lambda(config, levels).log())  # where each level was
    eighth = max(1, last // 8)
    for table in (module for module in given.modules() if isinstance(module, LevelTable)):
        table.fold()
        rows = table(at.clamp(0, last))
        first, final = table.rows[eighth] - table.rows[0], table.rows[last] - table.rows[last - eighth]
        table.rows.copy_(rows + (at.clamp_max(0)[:, None] * first + (at - last).clamp_min(0)[:, None] * final) / eighth)
