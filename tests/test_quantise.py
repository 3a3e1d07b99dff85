"""Which symbol a residual gets: the nearest, or one that costs less by rate and error together."""

import copy
import math

import numpy as np
import pytest
import torch

from mlic.layers import bounded
from mlic.prior import LIKELIHOOD_MIN, GaussianPrior
from mlic.strategies import Estimate, Relaxed, Write


def bits(symbol: int, sigma: float) -> float:
    below, above = ((symbol + side) / sigma / math.sqrt(2) for side in (-0.5, 0.5))
    return -math.log2(max(0.5 * (math.erf(above) - math.erf(below)), 1e-9))


def likelihood(prior: GaussianPrior, residual: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """P(bin of width 1 around `residual`), for autograd."""
    residual, sigma = residual.abs(), prior.sigma(scale)
    lower, upper = (0.5 * torch.erfc((residual + side) / sigma * 2**-0.5) for side in (0.5, -0.5))
    return bounded(upper - lower, LIKELIHOOD_MIN)


def cost(residual: float, symbol: int, sigma: float, error_bits: float) -> float:
    return bits(symbol, sigma) + error_bits * (residual - symbol) ** 2


@pytest.mark.parametrize("form", ["linear", "log"])
@pytest.mark.parametrize("error_bits", [4.0, 25.0, 400.0])
def test_symbols_against_the_costs(form, error_bits):
    residuals = torch.linspace(-3.47, 3.47, 233)
    lowered = 0
    for sigma in (0.2, 0.5, 1.3, 6.0):
        scale = torch.full_like(residuals, math.log(sigma) if form == "log" else sigma)
        symbols = GaussianPrior(form, error_bits).nearest(residuals, scale)
        for residual, symbol in zip(residuals.tolist(), symbols.tolist()):
            nearest = round(residual)
            lower = nearest - (nearest > 0) + (nearest < 0)
            if max(bits(nearest, sigma), bits(lower, sigma)) > 20:  # beyond what the float32 likelihood tells apart
                continue
            costs = {s: cost(residual, s, sigma, error_bits) for s in (nearest, lower)}
            assert costs[int(symbol)] == pytest.approx(min(costs.values()), abs=1e-3)
            lowered += symbol != nearest
    assert lowered > 10 or error_bits == 400


def test_symbols_are_the_nearest_where_no_weight_is_given():
    residuals = torch.randn(2, 3, 4, 4) * 3
    assert torch.equal(GaussianPrior("log").nearest(residuals, torch.zeros_like(residuals)), residuals.round())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symbols_keep_shape_and_type(dtype):
    residuals = torch.randn(2, 3, 4, 4, dtype=dtype) * 3
    symbols = GaussianPrior("log", 25.0).nearest(residuals, torch.zeros_like(residuals))
    assert symbols.shape == residuals.shape and symbols.dtype == dtype
    assert torch.equal(symbols, symbols.round())
    assert not GaussianPrior("log", 25.0).nearest(residuals * 0, residuals).any()


@pytest.mark.parametrize("form", ["linear", "log"])
def test_slopes_of_the_bits_are_those_of_the_likelihood(form):
    """By hand they must be what autograd finds: of the symbols for the scale, at another place for the residual."""
    torch.manual_seed(0)
    prior = GaussianPrior(form)
    symbols, at = (torch.randn(2, 500) * 3).round(), torch.randn(2, 500) * 3
    scale = torch.empty(2, 500).uniform_(0.05, 6)  # some below the least
    scale = scale.log() if form == "log" else scale
    wanted, got = [], []
    for slopes, of in ((wanted, lambda x, s, _: -likelihood(prior, x, s).log2()), (got, prior.bits)):
        place, raw = at.clone().requires_grad_(), scale.clone().requires_grad_()
        bits = of(symbols, raw, place)
        (by_scale,) = torch.autograd.grad(bits.sum(), raw)
        there = of(place, scale, place)
        (by_place,) = torch.autograd.grad(there.sum(), place)
        slopes += [bits.detach(), by_scale, by_place]
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)
    (elsewhere,) = torch.autograd.grad(prior.bits(symbols, scale, place).sum(), place)
    torch.testing.assert_close(elsewhere, wanted[2], rtol=2e-3, atol=1e-4)


class Heard:
    """In place of a SymbolEncoder: keeps y's symbols."""

    def __init__(self) -> None:
        self.symbols = []

    def put_hyper(self, *_) -> None: ...

    def put_plain(self, *_) -> None: ...

    def put_latent(self, symbols, _rows) -> None:
        self.symbols.append(symbols)


@pytest.mark.parametrize("dependent", [False, True])
@torch.no_grad()
def test_y_has_no_say_in_silent_channels(small_models, dependent):
    """Whoever asks; in the others it has."""
    model = small_models["fast"]
    gaussian = copy.copy(model.gaussian if dependent else model.gaussian.plain())
    gaussian.silent = (1, 9)
    torch.manual_seed(0)
    y, z = 5 * torch.randn(1, sum(model.config.slices), 8, 8), torch.randn(1, model.config.z_channels, 2, 2)

    def answers(*channels: int) -> list[torch.Tensor]:
        """y_hat by three strategies, and the symbols that are written, where y is another in some channels."""
        other, out = y.clone(), Heard()
        other[:, channels] += 7
        args, level = (other, z, model.config.slices, gaussian), torch.tensor([1.0])
        strategies = Estimate(*args, noisy=False), Relaxed(*args), Write(*args, [out])
        return [*(model.code(strategy, level) for strategy in strategies), torch.from_numpy(np.concatenate(out.symbols))]

    first = answers()
    assert all(torch.equal(a, b) for a, b in zip(first, answers(1, 9)))
    assert not any(torch.equal(a, b) for a, b in zip(first, answers(1, 8, 9)))
    if not dependent:  # whose path may take another level for the sake of its neighbours
        estimate = Estimate(y, z, model.config.slices, gaussian, noisy=False)
        model.code(estimate, torch.tensor([1.0]))
        values = estimate.whole(values for _, (values, _, _) in estimate.said)
        assert [channel for channel in range(y.shape[1]) if not values[:, channel].any()] == [1, 9]
