"""Training: rate plus lambda times distortion, all rates at once for models with quality levels.

Needs torch, numpy, Pillow, safetensors and tqdm only; knows nothing of files or coders. One step is one function without
host synchronisation; on a CUDA device it is captured as a graph. Under torchrun, each process takes a share of the batch.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import ModelConfig
from .data import PictureBank
from .metrics import ms_ssim_tensor
from .model import STRIDE, CompressionModel, build_model

MEASURES = ("loss", "bpp", "mse", "gradient_norm", "skipped")
AVERAGE_EVERY = 8  # steps between updates of the averaged weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. It ends after `steps` or `minutes`, whichever is given; the schedule fits itself to that."""

    model: str | ModelConfig = "fast"
    data: tuple[str, ...]
    out: str
    steps: int | None = None
    minutes: float | None = None
    lmbda: float | None = None  # single-rate models; 255^2 * MSE, or 1 - MS-SSIM, is multiplied by it
    metric: str = "mse"  # or "ms-ssim", for single-rate models
    val: tuple[str, ...] = ()
    batch: int = 4  # per process
    crop: int = 256
    lr: float = 4e-4
    lr_end: float = 1e-5
    entropy_lr: float = 2.0  # of all but g_a and g_s, relative to `lr`
    warmup: float = 0.03  # of the run
    decay: float = 0.5  # of the run, at its end: linear to lr_end
    ema: float = 0.998  # of the averaged weights, per step
    clip: float = 1.0  # gradient norm
    level_weight: float = 0.5  # a sample's loss is divided by lambda to this power, so that low rates count too
    seed: int = 0
    threads: int | None = None
    bf16: bool = True
    compiled: bool = False
    save_every: float = 300.0  # seconds
    log_every: int = 50  # steps

    def __post_init__(self) -> None:
        """Raises ValueError on settings that do not fit together."""
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")
        if self.crop % STRIDE:
            raise ValueError(f"crop must be a multiple of {STRIDE}, not {self.crop}")
        if self.metric not in ("mse", "ms-ssim"):
            raise ValueError(f"metric is mse or ms-ssim, not {self.metric!r}")
        if self.metric == "ms-ssim" and self.crop < 192:
            raise ValueError("MS-SSIM needs crops of 192 pixels or more")


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Warm-up, stable, decay. `progress` in 0..1."""
    if progress < config.warmup:
        return config.lr * (progress + 1e-3) / config.warmup
    if progress < 1 - config.decay:
        return config.lr
    return config.lr_end + (config.lr - config.lr_end) * max(0.0, 1 - progress) / config.decay


def level_lambda(config: ModelConfig, level: Tensor) -> Tensor:
    """Lambda of a (real) quality level: log-spaced over `lambda_range`."""
    low, high = (math.log(value) for value in config.lambda_range)
    return torch.exp(low + (high - low) * level / (config.quality_levels - 1))


def rate_and_mse(x: Tensor, x_hat: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Per-picture (bits per pixel, MSE on 0..1), both (B,)."""
    return bits / (x.shape[2] * x.shape[3]), (x_hat.float() - x).square().flatten(1).mean(1)


class _Forward(nn.Module):
    """The model's forward pass as tensors in and out, for DistributedDataParallel and torch.compile."""

    def __init__(self, model: CompressionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, level: Tensor | None) -> tuple[Tensor, Tensor]:
        x_hat, estimate = self.model(x, level)
        return x_hat, estimate.y_bits + estimate.z_bits


class Trainer:
    """Model, optimiser, averaged weights and data on one device, and the step that moves them."""

    def __init__(self, config: TrainConfig, *, device: str = "cpu", rank: int = 0, world: int = 1) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)  # the same first weights everywhere, then each process its own crops and noise
        self.config, self.device = config, torch.device(device)
        cuda = self.device.type == "cuda"
        # on CPUs it brings nothing, and torch 2.13's backward pass crashes with it
        self.layout = torch.channels_last if cuda else torch.contiguous_format
        self.model = build_model(config.model).to(device, memory_format=self.layout).train()
        self.shape = self.model.config
        if self.shape.variable_rate == (config.lmbda is not None):
            raise ValueError(f"{self.shape.name} {'takes no' if self.shape.variable_rate else 'needs a'} lambda")
        if self.shape.variable_rate and config.metric != "mse":
            raise ValueError(f"{self.shape.name} is trained for MSE: its lambdas are MSE's")
        torch.manual_seed(config.seed + rank)
        self.bank = PictureBank(config.data, smallest=config.crop, device=device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.forward: nn.Module = _Forward(self.model)
        if config.compiled:
            self.forward.compile()
        if world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
        groups = []
        for relative, own in ((1.0, True), (config.entropy_lr, False)):
            parameters = [p for n, p in self.model.named_parameters() if n.startswith(("g_a.", "g_s.")) == own]
            rate = torch.tensor(config.lr, device=device) if cuda else config.lr
            groups.append({"params": parameters, "lr": rate, "relative": relative})
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        self.optimiser.grad_scale, self.optimiser.found_inf = None, torch.zeros((), device=device)
        self.measures = torch.zeros(len(MEASURES), device=device)  # sums since they were last read
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.capture = cuda and world == 1

    def step(self, progress: float) -> None:
        """One optimiser step at a point of the run in 0..1."""
        for group in self.optimiser.param_groups:
            rate = learning_rate(self.config, progress) * group["relative"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self.capture and self.steps >= 3:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._update()
            self.graph.replay()
        elif self.capture:  # as graphs want it: warm up beside the main stream
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self._update()
            torch.cuda.current_stream().wait_stream(beside)
        else:
            self._update()
        self.steps += 1
        if self.steps % AVERAGE_EVERY == 0:
            now = min(self.config.ema**AVERAGE_EVERY, (1 + self.steps) / (10 * AVERAGE_EVERY + self.steps))
            averages, weights = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averages, [w.detach() for w in weights], 1 - now)

    def _update(self) -> None:
        config = self.config
        x = self.bank.crops(config.batch, config.crop).contiguous(memory_format=self.layout)
        level, lmbda, weight = None, config.lmbda, 1.0
        if self.shape.variable_rate:
            level = torch.rand(config.batch, device=self.device) * (self.shape.quality_levels - 1)
            lmbda = level_lambda(self.shape, level)
            weight = (lmbda / 0.01) ** -config.level_weight
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16, cache_enabled=False):
            x_hat, bits = self.forward(x, level)
        bpp, mse = rate_and_mse(x, x_hat, bits)
        if config.metric == "mse":
            distortion = 255**2 * mse
        else:
            distortion = 1 - ms_ssim_tensor(x_hat.float(), x, 1.0)
        loss = (weight * (bpp + lmbda * distortion)).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip, foreach=True)
        bad = (~torch.isfinite(norm)).float()
        self.optimiser.found_inf.copy_(bad)  # Adam leaves everything as it was where this is 1
        self.optimiser.step()
        seen = torch.stack([loss.detach(), bpp.detach().mean(), mse.detach().mean(), norm.detach()])
        self.measures += torch.cat([seen.nan_to_num(0, 0, 0), bad[None]])

    def read_measures(self, steps: int) -> dict[str, float]:
        """Means over the last `steps` steps (`skipped`: their sum); synchronises with the device."""
        sums = self.measures.tolist()
        self.measures.zero_()
        return {name: value if name == "skipped" else value / steps for name, value in zip(MEASURES, sums)}

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "measures": self.measures,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "steps": self.steps,
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.measures.copy_(state["measures"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        self.steps = state["steps"]


@torch.no_grad()
def validate(model: CompressionModel, bank: PictureBank, levels: tuple[float, ...], size: int = 512) -> list[dict]:
    """Mean bpp and PSNR at each level, without noise, on the middle of each picture (at most `size` pixels a side)."""
    rows = []
    for level in levels if model.config.variable_rate else (0.0,):
        seen = []
        for index in range(len(bank)):
            picture = bank.picture(index)
            height, width = (min(size, side) // STRIDE * STRIDE for side in picture.shape[1:])
            top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
            x = picture[None, :, top : top + height, left : left + width].float() / 255
            at = torch.tensor([level], device=x.device) if model.config.variable_rate else None
            x_hat, estimate = model(x, at, noisy=False)
            bpp, mse = rate_and_mse(x, x_hat.clamp(0, 1), estimate.y_bits + estimate.z_bits)
            seen.append((bpp.item(), -10 * math.log10(max(mse.item(), 1e-10))))
        bpp, psnr = (sum(values) / len(values) for values in zip(*seen))
        rows.append({"level": level, "bpp": bpp, "psnr": psnr})
    return rows


def train(config: TrainConfig, *, device: str = "cpu") -> CompressionModel:
    """Run, writing `checkpoint.pt` (to go on from) and `log.csv` into `config.out`. Returns the averaged model.

    A checkpoint in `config.out` is continued, also into a longer run. Raises ValueError on settings that do not fit.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with _process_group(world, device):
        if world > 1 and device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if world > 1 and config.steps is None:
            raise ValueError("several processes must end together: give steps, not minutes")
        trainer = Trainer(config, device=device, rank=rank, world=world)
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = out / ("checkpoint.pt" if rank == 0 else f"checkpoint-{rank}.pt")
        elapsed = 0.0
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location=device, weights_only=True)
            trainer.load(state)
            elapsed = state["elapsed"]
        _run(config, trainer, checkpoint, elapsed, quiet=rank > 0)
        if config.val and rank == 0:
            bank = PictureBank(config.val, smallest=STRIDE, device=device)
            last = max(1, trainer.shape.quality_levels - 1)
            for row in validate(trainer.average.eval(), bank, tuple(last * i / 6 for i in range(7))):
                print(f"level {row['level']:5.1f}  {row['bpp']:.4f} bpp  {row['psnr']:.2f} dB", file=sys.stderr)
    return trainer.average


def _run(config: TrainConfig, trainer: Trainer, checkpoint: Path, elapsed: float, *, quiet: bool) -> None:
    total, unit = (config.steps, "step") if config.steps else (config.minutes * 60, "s")

    def done() -> float:
        return trainer.steps if config.steps else elapsed

    started, saved = time.monotonic() - elapsed, time.monotonic()
    bar = tqdm(total=int(total), initial=int(done()), unit=unit, disable=True if quiet else None)
    log_path = checkpoint.with_name("log.csv")
    new_log = not log_path.exists()
    with contextlib.nullcontext() if quiet else open(log_path, "a", newline="") as log_file:
        log = None if quiet else csv.writer(log_file)
        if log and new_log:
            log.writerow(["step", "seconds", *MEASURES, "learning_rate", "pixels_per_second"])
        logged = time.monotonic()
        while done() / total < 1:
            trainer.step(done() / total)
            elapsed = time.monotonic() - started
            bar.update(int(done()) - bar.n)
            if trainer.steps % config.log_every == 0:
                seen = trainer.read_measures(config.log_every)
                now = time.monotonic()
                speed = config.log_every * config.batch * config.crop**2 / (now - logged)
                logged = now
                if log:
                    rate = learning_rate(config, done() / total)
                    log.writerow([trainer.steps, f"{elapsed:.1f}", *(f"{v:.5g}" for v in seen.values()), f"{rate:.3g}", f"{speed:.4g}"])
                    log_file.flush()
                psnr = -10 * math.log10(max(seen["mse"], 1e-10))
                bar.set_postfix(loss=f"{seen['loss']:.3f}", bpp=f"{seen['bpp']:.3f}", psnr=f"{psnr:.2f}", px_s=f"{speed:.3g}")
            if time.monotonic() - saved >= config.save_every:
                _save(trainer, checkpoint, elapsed)
                saved = time.monotonic()
    _save(trainer, checkpoint, elapsed)
    bar.close()


def _save(trainer: Trainer, checkpoint: Path, elapsed: float) -> None:
    """Whole or not at all; a full disk is a word on stderr, and training goes on."""
    partial = checkpoint.with_suffix(".tmp")
    try:
        torch.save({**trainer.state(), "elapsed": elapsed}, partial)
        partial.replace(checkpoint)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        print(f"checkpoint not written: {str(error).splitlines()[0]}; training goes on", file=sys.stderr)


@contextlib.contextmanager
def _process_group(world: int, device: str):
    if world == 1:
        yield
        return
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
