"""A codec network: g_a, h_a, h_s, g_s, the priors and the entropy model, put together from a config."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .config import CONFIGS, ModelConfig
from .entropy_model import MultiReferenceEntropyModel
from .prior import FactorizedPrior, GaussianPrior, LevelTable
from .strategies import Estimate, Strategy
from .tables import CodingTables
from .transforms import PatchAnalysis, PatchSynthesis, ResidualAnalysis, ResidualSynthesis, hyper_analysis, hyper_synthesis

T = TypeVar("T", float, Tensor)
STRIDE = 64  # of z: pictures are padded to a multiple of it


def level_lambda(config: ModelConfig, level: Tensor) -> Tensor:
    """Lambda of a (real) quality level: log-spaced over `lambda_range`."""
    low, high = (math.log(value) for value in config.lambda_range)
    return torch.exp(low + (high - low) * level / (config.quality_levels - 1))


def log_lambda_level(config: ModelConfig, log_lambda: T) -> T:
    """The other way: the (real) level of the logarithm of a lambda, also below the first and above the last."""
    low, high = (math.log(value) for value in config.lambda_range)
    return (log_lambda - low) / (high - low) * (config.quality_levels - 1)


def lambda_level(config: ModelConfig, lmbda: float) -> float:
    """The (real) quality level of a lambda, the first or the last where it is beyond `lambda_range`."""
    return min(config.quality_levels - 1.0, max(0.0, log_lambda_level(config, math.log(lmbda))))


class QualityGains(nn.Module):
    """Learned per-quality gain vectors (Cui et al., CVPR 2021), log-linear between levels.

    One vector each for the latent (divided out again on the other side by its own vector), one feature map of g_a, one
    of g_s, and an offset on Phi_h.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        levels, m, n = config.quality_levels, config.latent_channels, config.width
        # high-rate theory for an orthonormal transform: step^2 = 18 / (lambda ln 2), here in units of the block DCT
        gain = np.sqrt(np.geomspace(*config.lambda_range, levels) / 0.0256)
        slope = torch.from_numpy(np.log(gain)).float()[:, None]
        self.encoder_latent = LevelTable(slope.repeat(1, m))
        self.decoder_latent = LevelTable(-slope.repeat(1, m))
        self.encoder_feature = LevelTable(torch.zeros(levels, n))
        self.decoder_feature = LevelTable(torch.zeros(levels, n))
        self.phi_h = LevelTable(torch.zeros(levels, config.phi_h_channels))

    def forward(self, name: str, level: Tensor) -> Tensor:
        """(B,) levels -> (B, C, 1, 1) positive gains."""
        return getattr(self, name)(level).exp()[:, :, None, None]


class CompressionModel(nn.Module):
    """Any model of the family. Pictures are (B, 3, H, W) in 0..1 with H and W multiples of 64.

    `level` is a (B,) tensor, real, in 0..quality_levels-1, for models with a variable rate, and None for the others.
    """

    tables: CodingTables | None = None  # set by weights.py: the integer tables of real files
    digest: bytes = b""  # SHA-256 of config, weights and tables, set with them

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        residual = config.transform == "residual"
        self.g_a = ResidualAnalysis(config) if residual else PatchAnalysis(config)
        self.g_s = ResidualSynthesis(config) if residual else PatchSynthesis(config)
        self.h_a = hyper_analysis(config)
        self.h_s = hyper_synthesis(config)
        self.prior = FactorizedPrior(config.z_channels, levels=config.quality_levels)
        self.gaussian = GaussianPrior(config.scale_form, config.error_bits, shifted=config.shifted)
        self.gains = QualityGains(config) if config.variable_rate else None
        self.entropy_model = MultiReferenceEntropyModel(config)

    def analyse(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """Picture -> y (B, M, H/16, W/16), scaled so that rounding to integers is right for the level."""
        if self.gains is None:
            return self.g_a(x)
        return self.g_a(x, self.gains("encoder_feature", level)) * self.gains("encoder_latent", level)

    def code(self, strategy: Strategy, level: Tensor | None = None) -> Tensor:
        """Let a strategy take z and y through the priors -> y_hat (B, M, H/16, W/16)."""
        phi_h = self.h_s(self.entropy_model.walk_hyper(self.prior, level, strategy))
        if self.gains is not None:
            offset = self.gains.phi_h(level)[:, :, None, None]
            phi_h = self.entropy_model.settle(phi_h + offset.to(phi_h.dtype))
        return self.entropy_model.walk(phi_h, strategy)

    def synthesise(self, y_hat: Tensor, level: Tensor | None = None) -> Tensor:
        """y_hat -> picture, not yet clipped."""
        if self.gains is None:
            return self.g_s(y_hat.float())
        return self.g_s(y_hat.float() * self.gains("decoder_latent", level), self.gains("decoder_feature", level))

    def forward(self, x: Tensor, level: Tensor | None = None, *, noisy: bool = True) -> tuple[Tensor, Estimate]:
        """Picture -> (reconstruction, bits). `noisy` as in training; otherwise exactly what a file would hold."""
        y = self.analyse(x, level)
        estimate = Estimate(y, self.h_a(y), self.config.slices, self.gaussian, noisy=noisy)
        y_hat = self.code(estimate, level)
        return self.synthesise(y_hat, level), estimate


def build_model(config: str | ModelConfig) -> CompressionModel:
    """A model with fresh weights, from one of the names in `CONFIGS` or a config of your own.

    >>> build_model("fast").config.latent_channels
    448
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"no model called {config!r}; there are {', '.join(CONFIGS)}")
        config = CONFIGS[config]
    return CompressionModel(config)


def count_parameters(config: str | ModelConfig) -> int:
    """Trainable parameters, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


class Kmac(NamedTuple):
    """Thousands of multiply-accumulates per picture pixel, by part: g_a and h_a; h_s and entropy model; g_s."""

    analysis: float
    coding: float
    synthesis: float

    @property
    def encode(self) -> float:
        return self.analysis + self.coding

    @property
    def decode(self) -> float:
        return self.coding + self.synthesis


def kmac_per_pixel(config: str | ModelConfig, size: tuple[int, int] = (512, 768)) -> Kmac:
    """What a model computes for each pixel of a picture of `size` = (height, width), counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    height, width = size
    with torch.device("meta"), torch.inference_mode():
        model = build_model(config).eval().to("meta")
        x, level = torch.empty(1, 3, height, width), torch.zeros(1) if model.config.variable_rate else None

        def count(run) -> float:
            with FlopCounterMode(display=False) as counter:
                run()
            return counter.get_total_flops() / 2 / height / width / 1000

        y = model.analyse(x, level)
        estimate = Estimate(y, model.h_a(y), model.config.slices, model.gaussian, noisy=False)
        analysis = count(lambda: model.analyse(x, level)) + count(lambda: model.h_a(y))
        coding = count(lambda: model.code(estimate, level))
        return Kmac(analysis, coding, count(lambda: model.synthesise(y, level)))
