"""Training: rate plus lambda times distortion, all rates at once for models with quality levels.

Needs torch, numpy, Pillow, safetensors and tqdm only; knows nothing of .mlic files or coders. One step is one function
without host synchronisation; on a CUDA device it is captured as a graph. Under torchrun, each process adds crops of its
own to a step.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .branches import Branches, branch_convolutions
from .data import PictureBank
from .learning import begin_from, relative_rate, start
from .metrics import ms_ssim_tensor
from .model import STRIDE, CompressionModel, build_model, level_lambda
from .muon import Muon, matrix_weights
from .train_config import TrainConfig, crops_at, learning_rate
from .train_log import RunLog
from .transforms import LINEAR
from .validation import panel, rate_and_mse, symbol_counts, validate, validation_levels
from .weights import load_model

CHECKPOINT = "checkpoint.pt"
MEASURES = ("loss", "bpp", "mse", "gradient_norm")
AVERAGE_EVERY = 8  # steps between updates of the averaged weights


def has_bfloat16(device: torch.device) -> bool:
    """Has it units for bfloat16? Devices without them compute in it all the same, many times slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


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
            for kind in ("weight", "bias")
        ]

    def forward(self, x: Tensor, level: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bool(self.halved), cache_enabled=False):
            if not self.halved or torch.compiler.is_compiling():  # a compiler fuses autocast's copies
                x_hat, estimate = self.model(x, level)
            else:
                own = [self.model.get_parameter(name) for name in self.halved]
                halves = dict(zip(self.halved, _Halves.apply(self.branches, *own)))
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
        self.branches = Branches(config.branches if cuda else 0)
        branches = Branches() if config.compiled == "all" else self.branches  # a compiled graph has none of its own
        half = has_bfloat16(self.device) if config.bf16 is None else config.bf16
        self.forward: nn.Module = _Forward(self.model, half=half, branches=branches)
        if branches.streams:
            branch_convolutions(self.model, {name.rpartition(".")[0] for name in self.forward.halved}, branches)
        if config.compiled == "all":
            self.forward.compile(dynamic=False, fullgraph=True)
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
                if (id(p) in matrices) == of_muon:
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
        self.optimisers: list[torch.optim.Optimizer] = [adam] + (
            [Muon(groups(True), branches=self.branches)] if matrices else []
        )

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

    def _update(self, batch: int, crop: int) -> None:
        config = self.config
        x = self.bank.crops(batch, crop).contiguous(memory_format=self.layout)
        level, lmbda, weight = None, config.lmbda, 1.0
        if self.shape.variable_rate:
            place = (torch.arange(batch, device=self.device) + torch.rand(batch, device=self.device)) / batch
            level = place * (self.shape.quality_levels - 1)  # one from each part of the range, so that steps are alike
            lmbda = level_lambda(self.shape, level)
            weight = (lmbda / 0.01) ** -config.level_weight
        x_hat, bits = self.forward(x, level)
        bpp, mse = rate_and_mse(x, x_hat, bits)
        if config.metric == "mse":
            distortion = 255**2 * mse
        else:
            distortion = 1 - ms_ssim_tensor(x_hat.float(), x, 1.0)
        loss = (weight * (bpp + lmbda * distortion)).mean()
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip, foreach=True)
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
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
        except (KeyError, RuntimeError):
            raise ValueError(f"the run was not made with model {self.shape.name!r}") from None
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


def train(config: TrainConfig, *, device: str = "cpu") -> CompressionModel:
    """Run, writing `checkpoint.pt` (to go on from) and the logs of train_log.py into `config.out`. Returns the averaged
    model, with the counts for its coding tables.

    A checkpoint in `config.out` is continued, also into a longer run. Raises ValueError on settings that do not fit, and for a
    file that is no checkpoint.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and config.steps is None:
        raise ValueError("several processes must end together: give steps, not minutes")
    if world > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    with _process_group(world, device):
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        state = _read_checkpoint(out / CHECKPOINT)
        log = RunLog(out, tensorboard=config.tensorboard, step=state.get("steps", 0)) if rank == 0 else None
        val = PictureBank(config.val, smallest=STRIDE, device=device) if config.val and rank == 0 else None
        trainer = Trainer(config, device=device, rank=rank, world=world)
        if state:
            trainer.load(state)
            if rank > 0:  # what was saved is the first process's
                torch.manual_seed(config.seed + rank + world * trainer.steps)
        if log:
            log.go_on_from(trainer.steps)
        elapsed = _run(config, trainer, state.get("elapsed", 0.0), log, val)
        if val:
            for row in _validate(trainer, val, log, elapsed):
                print(f"level {row['level']:5.1f}  {row['bpp']:.4f} bpp  {row['psnr']:.2f} dB", file=sys.stderr)
        if log:
            crop = config.last_crop or config.crop
            trainer.average.gaussian.counts = symbol_counts(trainer.average.eval(), trainer.bank, crop=crop)
    return trainer.average


def _run(config: TrainConfig, trainer: Trainer, elapsed: float, log: RunLog | None, val: PictureBank | None) -> float:
    """Go on to the end, from `elapsed` seconds on. Returns the seconds at the end. In all processes but the first, which
    alone writes, `log` and `val` are None.
    """
    total, unit = (config.steps, "step") if config.steps else (config.minutes * 60, "s")

    def done() -> float:
        return trainer.steps if config.steps else elapsed

    started, saved = time.monotonic() - elapsed, time.monotonic()
    validated = logged = saved
    steps_logged = trainer.steps
    bar = tqdm(total=int(total), initial=int(done()), unit=unit, disable=None if log else True)
    while done() / total < 1:
        progress = done() / total
        trainer.step(progress)
        elapsed = time.monotonic() - started
        bar.update(int(done()) - bar.n)
        if log and (trainer.steps % config.log_every == 0 or done() / total >= 1):
            seen = trainer.read_measures()
            now, (batch, crop) = time.monotonic(), crops_at(config, progress)
            speed = (trainer.steps - steps_logged) * trainer.world * batch * crop**2 / (now - logged)
            logged, steps_logged = now, trainer.steps
            rates = {"learning_rate": f"{learning_rate(config, progress):.3g}", "pixels_per_second": f"{speed:.4g}"}
            measures = {name: f"{value:.5g}" for name, value in seen.items()}
            with _going_on("log"):
                log.line({"step": trainer.steps, "seconds": f"{elapsed:.1f}", **measures, **rates})
            shown = {"loss": f"{seen['loss']:.3f}", "bpp": f"{seen['bpp']:.3f}", "px_s": f"{speed:.3g}"}
            shown |= {"skipped": f"{seen['skipped']:g}"} if seen["skipped"] else {}
            bar.set_postfix(shown, psnr=f"{-10 * math.log10(max(seen['mse'], 1e-10)):.2f}")
        if log and time.monotonic() - saved >= config.save_every:
            _save(trainer, elapsed)
            saved = time.monotonic()
        if config.val_every and val and done() / total < 1 and time.monotonic() - validated >= config.val_every * 60:
            _validate(trainer, val, log, elapsed)
            validated = logged = time.monotonic()
    if log:
        _save(trainer, elapsed)
    bar.close()
    return elapsed


def _validate(trainer: Trainer, bank: PictureBank, log: RunLog, elapsed: float) -> list[dict]:
    """Rows of `validate` for the averaged weights, also into the log."""
    model = trainer.average.eval()
    rows, shown = validate(model, bank, validation_levels(model)), panel(model, bank)
    with _going_on("validation"):
        log.validation(rows, shown, step=trainer.steps, seconds=elapsed)
    return rows


def _save(trainer: Trainer, elapsed: float) -> None:
    """Whole or not at all."""
    checkpoint = Path(trainer.config.out, CHECKPOINT)
    partial = checkpoint.with_suffix(".tmp")
    with _going_on("checkpoint"):
        try:
            torch.save({**trainer.state(), "elapsed": elapsed}, partial)
            partial.replace(checkpoint)
        finally:
            partial.unlink(missing_ok=True)


def _read_checkpoint(path: Path) -> dict:
    """What `_save` wrote; empty where nothing is there."""
    if not path.exists():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["steps"], state["model"]
    except OSError:
        raise
    except Exception:  # torch's reader raises nearly everything on other files
        raise ValueError(f"{path} is damaged, or no checkpoint") from None
    return state


@contextlib.contextmanager
def _going_on(what: str):
    """A full disk is a word on stderr, and training goes on."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is torch's
        print(f"{what} not written: {str(error).splitlines()[0]}; training goes on", file=sys.stderr)


@contextlib.contextmanager
def _process_group(world: int, device: str):
    if world == 1:
        yield
        return
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
