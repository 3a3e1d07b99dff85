"""The settings of a training run, and what they say at each point of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .config import ModelConfig
from .model import STRIDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. It ends after `steps` or `minutes`, whichever is given; the schedule fits itself to that."""

    model: str | ModelConfig = "fast"
    data: tuple[str, ...]
    out: str
    steps: int | None = None
    minutes: float | None = None
    init: str | None = None  # a weights file, or the name of a packaged model, to begin from
    lmbda: float | None = None  # single-rate models; 255^2 * MSE, or 1 - MS-SSIM, is multiplied by it
    metric: str = "mse"  # or "ms-ssim", for single-rate models
    val: tuple[str, ...] = ()
    val_every: float | None = None  # minutes; None: at the end only
    tensorboard: bool = False
    batch: int = 4  # per process
    crop: int = 256
    last_crop: int | None = None  # pixels a side in the last share of the run; the batch then shrinks to match
    last_share: float = 0.15
    scales: tuple[float, ...] = (1.0, 0.75, 0.5)  # sizes at which every picture is taken, in equal shares where crops fit
    optimiser: str = "muon"  # with Adam for what is no matrix; or "adam" for all
    lr: float = 1e-3  # learning.py says how fast each part learns relative to it
    lr_end: float = 1e-5  # or `lr`, where that is less
    muon_lr: float = 1.0  # of the matrices under Muon, relative to Adam's
    muon_decay: float = 0.0  # weight decay of the matrices under Muon; of each, a step takes the learning rate times this
    warmup: float = 0.03  # of the run
    decay: float = 0.5  # of the run, at its end: linear to lr_end
    ema: float = 0.998  # of the averaged weights, per step
    clip: float = 1.0  # gradient norm
    papers_share: float = 0.3  # of the samples whose lambda is one of the papers' range; the others have any of the model's
    level_weight: float = 0.5  # a sample's loss is divided by lambda to this power, so that low rates count too
    seed: int = 0
    threads: int | None = None
    bf16: bool | None = None  # convolutions, and products of Muon, in bfloat16; None: where the device has units for it
    compiled: str | None = None  # by torch.compile: "formulas", of symbols and their bits, or "all": both passes as one graph
    graph: bool = True  # capture the step as a CUDA graph
    branches: int = 4  # streams of a CUDA device for what nothing waits for, see branches.py; none with several processes
    save_every: float = 300.0  # seconds
    log_every: int = 50  # steps

    def __post_init__(self) -> None:
        """Raises ValueError on settings that do not fit together."""
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")
        for crop in (self.crop, self.last_crop or STRIDE):
            if crop % STRIDE:
                raise ValueError(f"crop must be a multiple of {STRIDE}, not {crop}")
        if self.compiled not in (None, "formulas", "all"):
            raise ValueError(f"what is compiled is formulas or all, not {self.compiled!r}")
        if self.optimiser not in ("adam", "muon"):
            raise ValueError(f"optimiser is adam or muon, not {self.optimiser!r}")
        if self.val_every and not self.val:
            raise ValueError("to measure every few minutes, give pictures to measure on")
        if self.metric not in ("mse", "ms-ssim"):
            raise ValueError(f"metric is mse or ms-ssim, not {self.metric!r}")
        if self.metric == "ms-ssim" and min(self.crop, self.last_crop or self.crop) < 192:
            raise ValueError("MS-SSIM needs crops of 192 pixels or more")

    def told(self) -> str:
        """All settings, of paths the last names only: weights that are given away say nothing of the machine."""
        paths = {field: tuple(Path(path).name for path in getattr(self, field)) for field in ("data", "val")}
        init = self.init and Path(self.init).name
        return repr(dataclasses.replace(self, **paths, out=Path(self.out).name, init=init))


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Warm-up, stable, decay. `progress` in 0..1."""
    if progress < config.warmup:
        return config.lr * min(1.0, (progress + 1e-3) / config.warmup)
    if progress < 1 - config.decay:
        return config.lr
    end = min(config.lr, config.lr_end)
    return end + (config.lr - end) * max(0.0, 1 - progress) / config.decay


def crops_at(config: TrainConfig, progress: float) -> tuple[int, int]:
    """(batch, pixels a side) at a point of the run in 0..1."""
    if config.last_crop is None or progress < 1 - config.last_share:
        return config.batch, config.crop
    return max(1, round(config.batch * (config.crop / config.last_crop) ** 2)), config.last_crop
