"""Training: rate plus lambda times distortion, all rates at once for models with quality levels.

Needs torch, numpy, Pillow, safetensors and tqdm only; knows nothing of files or coders.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .config import ModelConfig
from .data import load_pictures, random_crops
from .model import CompressionModel, build_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. It ends after `steps` or `minutes`, whichever is given; the schedule fits itself to that."""

    model: str | ModelConfig = "fast"
    data: tuple[str, ...]
    out: str
    steps: int | None = None
    minutes: float | None = None
    lmbda: float | None = None  # single-rate models; 255^2 * MSE is multiplied by it
    batch: int = 4
    crop: int = 256
    lr: float = 4e-4
    lr_end: float = 1e-5
    entropy_lr: float = 2.0  # of all but g_a and g_s, relative to `lr`
    warmup: float = 0.03  # of the run
    decay: float = 0.5  # of the run, at its end: linear to lr_end
    ema: float = 0.998
    clip: float = 1.0
    level_weight: float = 0.5  # a sample's loss is divided by lambda to this power, so that low rates count too
    seed: int = 0
    threads: int | None = None
    bf16: bool = True
    save_every: float = 300.0  # seconds
    log_every: int = 50  # steps


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


def loss_terms(model: CompressionModel, x: Tensor, level: Tensor | None, *, noisy: bool = True) -> tuple[Tensor, Tensor]:
    """Per-picture (bits per pixel, MSE on 0..1), both (B,)."""
    x_hat, estimate = model(x, level, noisy=noisy)
    pixels = x.shape[2] * x.shape[3]
    mse = (x_hat.float() - x).square().flatten(1).mean(1)
    return (estimate.y_bits + estimate.z_bits) / pixels, mse


def _warm_average(decay: float):
    """Exponential average of weights whose window grows with the run, so that short runs are averaged too."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
        now = min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, weights, 1 - now)

    return update


def train(config: TrainConfig, *, device: str = "cpu") -> CompressionModel:
    """Run, writing `checkpoint.pt` (to go on from) and `log.csv` into `config.out`. Returns the averaged model.

    A checkpoint in `config.out` is continued. Raises ValueError on settings that do not fit together.
    """
    if (config.steps is None) == (config.minutes is None):
        raise ValueError("give either steps or minutes")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    model = build_model(config.model).to(device).train()
    shape = model.config
    if shape.variable_rate == (config.lmbda is not None):
        raise ValueError(f"{shape.name} {'takes no' if shape.variable_rate else 'needs a'} lambda")
    pictures = load_pictures(list(config.data), smallest=config.crop, device=device)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_warm_average(config.ema))
    transforms = [*model.g_a.parameters(), *model.g_s.parameters()]
    rest = [p for name, p in model.named_parameters() if not name.startswith(("g_a.", "g_s."))]
    groups = [{"params": transforms, "relative": 1.0}, {"params": rest, "relative": config.entropy_lr}]
    optimiser = torch.optim.Adam(groups, lr=config.lr, betas=(0.9, 0.99))

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    step, elapsed, skipped = 0, 0.0, 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["rng"].cpu())
        step, elapsed, skipped = state["step"], state["elapsed"], state["skipped"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimiser": optimiser.state_dict(),
            "generator": generator.get_state(),
            "rng": torch.get_rng_state(),
            "step": step,
            "elapsed": elapsed,
            "skipped": skipped,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    total = config.steps or config.minutes * 60
    log_file = open(out / "log.csv", "a", newline="")
    log = csv.writer(log_file)
    started, saved = time.monotonic() - elapsed, time.monotonic()
    running = torch.zeros(4)
    bar = tqdm(total=int(total), initial=int(step if config.steps else elapsed), unit="step" if config.steps else "s", disable=None)
    while (progress := (step if config.steps else elapsed) / total) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, progress) * group["relative"]
        x = random_crops(pictures, config.batch, config.crop, generator).to(memory_format=torch.channels_last)
        level = None
        lmbda, weight = torch.tensor(config.lmbda or 0.0), torch.ones(())
        if shape.variable_rate:
            level = torch.rand(config.batch, generator=generator).to(device) * (shape.quality_levels - 1)
            lmbda = level_lambda(shape, level)
            weight = (lmbda / 0.01) ** -config.level_weight
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.bf16):
            bpp, mse = loss_terms(model, x, level)
        loss = (weight * (bpp + lmbda * 255**2 * mse)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if torch.isfinite(norm):
            optimiser.step()
            average.update_parameters(model)
        else:
            skipped += 1
        step += 1
        elapsed = time.monotonic() - started
        bar.update(int(step if config.steps else elapsed) - bar.n)
        running += torch.stack([loss.detach(), bpp.detach().mean(), mse.detach().mean(), norm])
        if step % config.log_every == 0:
            mean = (running / config.log_every).tolist()
            running.zero_()
            log.writerow([step, f"{elapsed:.1f}", *(f"{v:.5g}" for v in mean), f"{optimiser.param_groups[0]['lr']:.3g}", skipped])
            log_file.flush()
            bar.set_postfix(loss=f"{mean[0]:.3f}", bpp=f"{mean[1]:.3f}", psnr=f"{-10 * math.log10(mean[2]):.2f}")
        if time.monotonic() - saved > config.save_every:
            save()
            saved = time.monotonic()
    save()
    bar.close()
    log_file.close()
    return average.module
