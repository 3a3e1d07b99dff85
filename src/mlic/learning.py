"""Where the weights of a training run begin, how fast each of them learns, and what happens to units that went silent.

Adam moves every weight by about the learning rate a step, all weights of a sum together, so a unit that sums n inputs
moves n times as far. With one rate for all, wide convolutions push their ReLUs below zero for good within a few
hundred steps (docs/training.md). So a weight's rate falls with the number of inputs of its sum (Yang et al. 2022,
"Tensor Programs V", table 8), the nets of the entropy model begin with signals that keep their size (He et al. 2015),
and units that go silent all the same get a new start now and then (Sokar et al. 2023, "The Dormant Neuron Phenomenon in
Deep Reinforcement Learning").
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .layers import PlainBlock
from .model import CompressionModel, level_lambda
from .prior import LevelTable

INPUTS = 192  # sums of more inputs than this learn more slowly
# relative to the run's learning rate, by the beginning of a parameter's name; the first that fits
PARTS = (("prior.", 8.0), ("gains.phi_h.", 1.0), ("gains.", 4.0), ("", 1.0))
LINEAR = ("g_a.linear.weight", "g_s.linear.weight")  # these begin as a DCT: small sums of large terms


def relative_rate(name: str, parameter: Tensor, *, matrix: bool = False) -> float:
    """Learning rate of a parameter of a CompressionModel relative to the run's. `matrix`: under Muon, whose steps do not
    grow with the sum.

    >>> relative_rate("h_s.0.weight", torch.empty(128, 128, 3, 3))
    0.16666666666666666
    """
    rate = next(rate for part, rate in PARTS if name.startswith(part))
    if parameter.ndim == 4 and not matrix and name not in LINEAR:
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
    """Copy the weights of a model of the same shape, or of one that lacks the steps of the anchors, whose nets begin with
    nothing to add, or the last slices: these begin with means of zero and small scales, and nothing but their own nets
    and the linear branches looks at them at first.

    Where the lambda range differs, a level begins as the one that had its lambda there; beyond the range, as the line
    through the outermost eighth goes on. Raises ValueError.
    """
    given, slices = copy.deepcopy(given), given.config.slices
    free = {field: getattr(model.config, field) for field in ("slices", "lambda_range", "error_bits")}
    if not given.config.step_hidden:
        free["step_hidden"] = model.config.step_hidden
    if dataclasses.replace(given.config, **free) != model.config or model.config.slices[: len(slices)] != slices:
        raise ValueError(f"the weights to begin from are of another shape ({given.config.name!r})")
    if given.config.lambda_range != model.config.lambda_range:
        _move_levels(given, model.config)
    own = model.state_dict()
    for name, value in given.state_dict().items():
        if name in ("h_a.0.weight", "g_s.head.weight"):
            own[name].zero_()
        own[name][tuple(slice(size) for size in value.shape)] = value
    small = -1.5 if model.config.scale_form == "log" else 0.2
    for nets in model.entropy_model.slices[len(slices) :]:
        for net in (nets.parameters_anchor, nets.parameters_non_anchor):
            net[-1].weight.zero_()
            net[-1].bias.copy_(torch.tensor([small, 0.0]).repeat_interleave(len(net[-1].bias) // 2))


def _move_levels(given: CompressionModel, config: ModelConfig) -> None:
    """Let the level tables of `given` say what they say of each lambda at the level where `config` has it."""
    levels = torch.arange(config.quality_levels, dtype=torch.float32)
    low, high = (math.log(value) for value in given.config.lambda_range)
    last = len(levels) - 1
    at = (level_lambda(config, levels).log() - low) / (high - low) * last  # where each level was
    eighth = max(1, last // 8)
    for table in (module for module in given.modules() if isinstance(module, LevelTable)):
        table.fold()
        rows = table(at.clamp(0, last))
        first, final = table.rows[eighth] - table.rows[0], table.rows[last] - table.rows[last - eighth]
        table.rows.copy_(rows + (at.clamp_max(0)[:, None] * first + (at - last).clamp_min(0)[:, None] * final) / eighth)


SILENT = 0.002  # a unit awake at a smaller share of positions
AWAKE_ABOVE = {nn.ReLU: 0.0, nn.GELU: -3.0}  # below, there is next to no output and no gradient


@torch.no_grad()
def shares_awake(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Share of positions at which each unit is awake, (C,) by the name of its ReLU or GELU, over all that `run` computes.
    The MLPs of the window attention, whose channels come last, are not looked at.
    """
    awake: dict[str, list[Tensor]] = {}

    def count_awake(name: str, bound: float):
        def count(_module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
            if inputs[0].ndim == 4:
                awake.setdefault(name, []).append((inputs[0] > bound).float().mean((0, 2, 3)))

        return count

    hooks = [
        module.register_forward_hook(count_awake(name, AWAKE_ABOVE[type(module)]))
        for name, module in model.named_modules()
        if type(module) in AWAKE_ABOVE
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(shares).mean(0) for name, shares in awake.items()}


def _neighbours(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Names of (convolution before, activation, convolution after), where each feeds the next and nothing else."""

    def conv_of(name: str, module: nn.Module) -> str | None:
        if isinstance(module, nn.Sequential):  # a sub-pixel convolution
            name, module = f"{name}.0", module[0]
        return name if isinstance(module, nn.Conv2d) and module.groups == 1 else None

    for name, module in model.named_modules():
        if isinstance(module, PlainBlock):
            yield f"{name}.conv1", f"{name}.act", f"{name}.conv2"
        elif isinstance(module, nn.Sequential):
            layers = list(module.named_children())
            for (first, before), (middle, act), (last, after) in zip(layers, layers[1:], layers[2:]):
                ends = conv_of(f"{name}.{first}", before), conv_of(f"{name}.{last}", after)
                if type(act) in AWAKE_ABOVE and all(ends):
                    yield ends[0], f"{name}.{middle}", ends[1]


@torch.no_grad()
def recycle(
    models: tuple[nn.Module, ...], shares: dict[str, Tensor], moments: dict[str, list[Tensor]], generator: torch.Generator
) -> int:
    """Give each silent unit new weights before it and zeros after it, in all `models`, so that they go on computing
    what they did. `moments`: the optimiser's, by parameter name; theirs become zero. Returns how many units it were.
    """
    count = 0
    for before, act, after in _neighbours(models[0]):
        silent = shares[act] < SILENT
        count += int(silent.sum())
        shape = models[0].get_parameter(f"{before}.weight").shape
        fresh = torch.randn(shape, generator=generator) * math.sqrt(2 / shape[1:].numel())
        fresh -= fresh.mean((1, 2, 3), keepdim=True)  # what comes in is mostly positive: no unit is to be so everywhere
        rows = silent.repeat_interleave(shape[0] // len(silent))  # a unit after a pixel shuffle has several
        for suffix, start_again, mask in (
            (f"{before}.weight", fresh.to(rows.device), rows[:, None, None, None]),
            (f"{before}.bias", torch.zeros((), device=rows.device), rows),
            (f"{after}.weight", torch.zeros((), device=rows.device), silent[None, :, None, None]),
        ):
            for model in models:
                parameter = model.get_parameter(suffix)
                parameter.copy_(torch.where(mask, start_again, parameter))
            for moment in moments.get(suffix, []):
                moment.mul_(~mask)
    return count
