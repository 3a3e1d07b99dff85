"""The training step: rate plus lambda times distortion, all rates at once for models with quality levels.

One step is one function without host synchronisation; on a CUDA device it is captured as a graph. Under torchrun, each
process adds crops of its own to a step.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from .branches import Branches, branch_convolutions
from .config import PAPERS_LAMBDAS, ModelConfig
from .data import PictureBank
from .layers import has_bfloat16
from .learning import begin_from, relative_rate, start
from .metrics import ms_ssim_tensor
from .model import CompressionModel, build_model, lambda_level, level_lambda
from .muon import Muon, matrix_weights
from .train_config import TrainConfig, crops_at, learning_rate
from .transforms import LINEAR
from .validation import rate_and_mse
from .weights import load_model

MEASURES = ("loss", "bpp", "mse", "gradient_norm")
AVERAGE_EVERY = 8  # steps between updates of the averaged weights


class _Halves(torch.autograd.Function):
    """Weights -> the same in bfloat16, and their gradients back in float32: all at once, where autocast takes two small
    copies for each. The gradients may come from branches.
    """

    @staticmethod
    def forward(ctx, branches: Branches, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.branches = branches
        halves = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
        torch._foreach_copy_(halves, list(weights))
        return tuple(halves)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.branches.join()
        wholes = [torch.empty_like(g, dtype=torch.float32) for g in grads]
        torch._foreach_copy_(wholes, list(grads))
        return None, *wholes


class _Forward(nn.Module):
    """The model's forward pass as tensors in and out, for DistributedDataParallel. In `half`, convolutions and linear
    layers run in bfloat16, as autocast lets them; the gradients of their weights are awaited on `branches`.
    """

    def __init__(self, model: CompressionModel, *, half: bool, branches: Branches = Branches()) -> None:
        super().__init__()
        self.model, self.branches = model, branches
        self.halved = [
            f"{name}.{kind}"
            for name, module in model.named_modules()
            if half and isinstance(module, (nn.Conv2d, nn.Linear)) and name not in LINEAR  # which lose too much in bfloat16
            if module.weight.requires_grad
            for kind in ("weight", "bias")
        ]

    def forward(self, x: Tensor, level: Tensor | None) -> tuple[Tensor, Tensor]:
        halves: dict[str, Tensor] = {}
        if self.halved:
            own = [self.model.get_parameter(name) for name in self.halved]
            halves = dict(zip(self.halved, _Halves.apply(self.branches, *own)))
        return self.passes(halves, x, level)

    def passes(self, halves: dict[str, Tensor], x: Tensor, level: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a compiler gets: the weights' copies are made outside, where two kernels take all of them."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bool(self.halved), cache_enabled=False):
            x_hat, estimate = torch.func.functional_call(self.model, halves, (x, level))
            return x_hat, estimate.y_bits + estimate.z_bits


class Trainer:
    """Model, optimisers, averaged weights and data on one device, and the step that moves them.

    `bank` may be shared by trainers; its pictures must be large enough for the crops.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        device: str = "cpu",
        rank: int = 0,
        world: int = 1,
        bank: PictureBank | None = None,
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)  # the same first weights everywhere, then each process its own crops and noise
        self.config, self.device, self.world = config, torch.device(device), world
        cuda = self.device.type == "cuda"
        # on CPUs it brings nothing, and torch 2.13's backward pass crashes with it
        self.layout = torch.channels_last if cuda else torch.contiguous_format
        self.model = build_model(config.model)
        self.shape = self.model.config
        start(self.model)
        if config.init:
            begin_from(self.model, load_model(config.init))
        self.model.to(device, memory_format=self.layout).train()
        if self.shape.variable_rate == (config.lmbda is not None):
            raise ValueError(f"{self.shape.name} {'takes no' if self.shape.variable_rate else 'needs a'} lambda")
        if self.shape.variable_rate and config.metric != "mse":
            raise ValueError(f"{self.shape.name} is trained for MSE: its lambdas are MSE's")
        torch.manual_seed(config.seed + rank)
        self.bank = bank or PictureBank(config.data, smallest=config.crop, scales=config.scales, device=device)
        if config.last_crop:
            self.bank.count(config.last_crop)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.branches = Branches(config.branches if cuda and world == 1 else 0)
        branches = Branches() if config.compiled == "all" else self.branches  # a compiled graph has none of its own
        self.half = has_bfloat16(self.device) if config.bf16 is None else config.bf16
        self.forward: nn.Module = _Forward(self.model, half=self.half, branches=branches)
        if branches.streams:
            branch_convolutions(self.model, {name.rpartition(".")[0] for name in self.forward.halved}, branches)
        if config.compiled == "all":
            self.forward.passes = torch.compile(self.forward.passes, dynamic=False, fullgraph=True)
        elif config.compiled:
            gaussian = self.model.gaussian
            for name in ("quantise", "bits_and_slopes"):
                setattr(gaussian, name, torch.compile(getattr(gaussian, name), dynamic=True))
        if world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
        self.capture = cuda and world == 1 and config.graph
        self._make_optimisers()
        self.measures = torch.zeros(len(MEASURES) + 2, device=device)  # sums since they were last read; steps skipped, and made
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_size, self.graph_warm = (0, 0), 0  # batch and crop it is for, and steps made with them before it
        self.beside = torch.cuda.Stream() if self.capture else None
        self.ends: collections.deque[torch.cuda.Event] = collections.deque()  # of the last steps on a CUDA device

    def _make_optimisers(self) -> None:
        """Adam for all, or Muon for matrices and Adam for the rest, each in groups of one learning rate."""
        cuda = self.device.type == "cuda"
        matrices = {id(p) for p in matrix_weights(self.model)} if self.config.optimiser == "muon" else set()

        def groups(of_muon: bool) -> list[dict]:
            by_rate: dict[float, list[nn.Parameter]] = {}
            for name, p in self.model.named_parameters():
                if p.requires_grad and (id(p) in matrices) == of_muon:
                    by_rate.setdefault(relative_rate(name, p, matrix=of_muon), []).append(p)
            made = []
            for relative, parameters in by_rate.items():
                rate = torch.tensor(self.config.lr, device=self.device) if cuda else self.config.lr  # a graph reads it
                scale = self.config.muon_lr if of_muon else 1.0
                made.append({"params": parameters, "lr": rate, "relative": relative * scale})
            return made

        adam = torch.optim.Adam(groups(False), betas=(0.9, 0.99), fused=True, capturable=self.capture)
        adam._warned_capturable_if_run_uncaptured = True  # the steps before the capture are meant
        adam.grad_scale, adam.found_inf = None, torch.zeros((), device=self.device)
        self.optimisers: list[torch.optim.Optimizer] = [adam]
        if matrices:
            decay = self.config.muon_decay
            self.optimisers.append(Muon(groups(True), weight_decay=decay, half=self.half, branches=self.branches))

    def prepare(self) -> None:
        """Have both passes compiled for all sizes of crops, which takes minutes, before a run's clock starts. Weights and
        random numbers stay as they are.
        """
        if self.config.compiled != "all":
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for size in dict.fromkeys(crops_at(self.config, progress) for progress in (0.0, 1.0)):
                self._losses(*size)[0].backward()
        self.model.zero_grad(set_to_none=True)

    def step(self, progress: float) -> None:
        """One optimiser step at a point of the run in 0..1. At most two stay unfinished on a CUDA device."""
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            rate = learning_rate(self.config, progress) * group["relative"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        size = crops_at(self.config, progress)
        if self.capture:
            self._update_by_graph(size)
        else:
            self._update(*size)
        self.steps += 1
        if self.steps % AVERAGE_EVERY == 0:
            now = min(self.config.ema**AVERAGE_EVERY, (1 + self.steps) / (10 * AVERAGE_EVERY + self.steps))
            averages, weights = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averages, [w.detach() for w in weights], 1 - now)
        if self.device.type == "cuda":  # so that a schedule in minutes sees the device's time, not the queue's
            self.ends.append(torch.cuda.Event(blocking=True))
            self.ends[-1].record()
            if len(self.ends) > 2:
                self.ends.popleft().synchronize()

    def _update_by_graph(self, size: tuple[int, int]) -> None:
        """`_update` as a CUDA graph, captured for each new size after three steps beside the main stream."""
        if size != self.graph_size:
            torch.cuda.synchronize()
            self.graph, self.graph_size, self.graph_warm = None, size, 0
        if self.graph_warm < 3:
            self.graph_warm += 1
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):
                self._update(*size)
            torch.cuda.current_stream().wait_stream(self.beside)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._update(*size)
        self.graph.replay()

    def _levels(self, batch: int) -> Tensor:
        """(batch,) levels: a share of them anywhere in the papers' range of lambdas, the others anywhere at all, each in a
        part of its range of its own, so that steps are alike.
        """
        low, high = (lambda_level(self.shape, lmbda) for lmbda in PAPERS_LAMBDAS)
        share = self.config.papers_share if low < high else 0.0
        place = (torch.arange(batch, device=self.device) + torch.rand(batch, device=self.device)) / batch
        inside = low + (high - low) * place / max(share, 1e-6)
        anywhere = (self.shape.quality_levels - 1) * (place - share) / max(1 - share, 1e-6)
        return torch.where(place < share, inside, anywhere)

    def _losses(self, batch: int, crop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of new crops: the loss, and bpp and MSE of each."""
        config = self.config
        x = self.bank.crops(batch, crop).contiguous(memory_format=self.layout)
        level, lmbda, weight = None, config.lmbda, 1.0
        if self.shape.variable_rate:
            level = self._levels(batch)
            lmbda = level_lambda(self.shape, level)
            weight = (lmbda / 0.01) ** -config.level_weight
        x_hat, bits = self.forward(x, level)
        bpp, mse = rate_and_mse(x, x_hat, bits)
        if config.metric == "mse":
            distortion = 255**2 * mse
        else:
            distortion = 1 - ms_ssim_tensor(x_hat.float(), x, 1.0)
        return (weight * (bpp + lmbda * distortion)).mean(), bpp, mse

    def _update(self, batch: int, crop: int) -> None:
        loss, bpp, mse = self._losses(batch, crop)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip, foreach=True)
        bad = (~torch.isfinite(norm)).float()
        for optimiser in self.optimisers:
            optimiser.found_inf.copy_(bad)  # it leaves everything as it was where this is 1
            optimiser.step()
        seen = torch.stack([loss.detach(), bpp.detach().mean(), mse.detach().mean(), norm.detach()])
        self.measures += torch.cat([seen.nan_to_num(0, 0, 0) * (1 - bad), torch.stack([bad, 1 - bad])])

    def read_measures(self) -> dict[str, float]:
        """Means over the steps made since the last call, NaN where there are none, and how many were `skipped`; synchronises
        with the device.
        """
        *sums, skipped, made = self.measures.tolist()
        self.measures.zero_()
        return {name: value / made if made else math.nan for name, value in zip(MEASURES, sums)} | {"skipped": skipped}

    def state(self) -> dict:
        return {
            "config": self.shape.to_json(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimisers[0].state_dict(),
            "muon": self.optimisers[1].state_dict() if self.optimisers[1:] else None,
            "measures": self.measures,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "steps": self.steps,
        }

    def load(self, state: dict) -> None:
        """Go on from `state()`, on any device. Raises ValueError when it is of another model or optimiser."""
        before = ModelConfig.from_json(state["config"]) if "config" in state else self.shape  # older ones have none
        own = dataclasses.asdict(self.shape)
        if differing := [name for name, value in dataclasses.asdict(before).items() if value != own[name]]:
            raise ValueError(f"the run was not made with this model: {', '.join(differing)} differ")
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
        except (KeyError, RuntimeError):
            raise ValueError(f"the run was not made with this model {self.shape.name!r}") from None
        if (state.get("muon") is not None) != (len(self.optimisers) > 1):
            raise ValueError(f"the run was not made with --optimiser {self.config.optimiser}")
        for optimiser, saved in zip(self.optimisers, (state["optimiser"], state.get("muon"))):
            own = [{k: v for k, v in group.items() if k != "params"} for group in optimiser.param_groups]
            optimiser.load_state_dict(saved)
            for group, settings in zip(optimiser.param_groups, own):
                group.update(settings)  # the device's kind of learning rate, not the saved one
            for p, moments in optimiser.state.items():
                for name, value in moments.items():
                    if value.shape == p.shape:  # the device's memory layout: fused Adam asks for it
                        moments[name] = torch.empty_like(p).copy_(value)
        if state["measures"].shape == self.measures.shape:  # an older version's are not
            self.measures.copy_(state["measures"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        self.steps = state["steps"]
