"""Fixed-point numbers carried in float64 tensors, and functions on them: the same on every machine.

Activations are multiples of 2^-12 below 2^11. exp, tanh and GELU are tables of their values at these, made from single IEEE
operations. Layers on this grid are exact.py's.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from torch import Tensor

FRACTION = 12  # bits behind the point of an activation
LIMIT = 2.0**11  # activations are clamped to +-LIMIT


def to_grid(x: Tensor, fraction: int = FRACTION) -> Tensor:
    """Round to multiples of 2^-fraction, ties to even."""
    return (x * 2.0**fraction).round_().mul_(2.0**-fraction)


def settle(x: Tensor) -> Tensor:
    """An exact sum back to an activation: on the grid, within the limit."""
    return to_grid(x).clamp_(-LIMIT, LIMIT)


def settle_units(x: Tensor) -> Tensor:
    """`settle` in place, for a sum that is counted in units of 2^-FRACTION."""
    return x.round_().mul_(2.0**-FRACTION).clamp_(-LIMIT, LIMIT)


def exact_exp(x: np.ndarray) -> np.ndarray:
    """exp from additions, multiplications and divisions alone, each rounded as IEEE 754 says: equal everywhere.

    >>> bool(np.allclose(exact_exp(np.linspace(-20, 5, 99)), np.exp(np.linspace(-20, 5, 99)), rtol=1e-13))
    True
    """
    small, total, term = x / 64.0, np.ones_like(x), np.ones_like(x)
    for n in range(1, 20):
        term = term * small / n
        total = total + term
    for _ in range(6):
        total = total * total
    return total


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """x * Phi(x), |x| <= 8, by the series of positive terms erf(z) = 2/sqrt(pi) exp(-z^2) sum 2^n z^(2n+1) / (2n+1)!!."""
    z = np.abs(x) / math.sqrt(2)
    term, total = z, z
    for n in range(1, 160):
        term = term * (2 * z * z) / (2 * n + 1)
        total = total + term
    erf = np.minimum(1.0, total * exact_exp(-(z * z)) * (2 / 1.7724538509055159))
    return x * (0.5 + 0.5 * np.sign(x) * erf)


def exact_tanh(x: np.ndarray) -> np.ndarray:
    doubled = exact_exp(-2 * np.abs(x))
    return np.sign(x) * (1 - doubled) / (1 + doubled)


@functools.cache
def function_table(name: str) -> np.ndarray:
    """One of the functions at every grid point of its range, rounded to the grid; float64."""
    step = 2.0**-FRACTION
    around = np.arange(-8, 8 + step, step)
    values = {
        "gelu": lambda: exact_gelu(around),
        "half_tanh": lambda: 0.5 * exact_tanh(around),
        "exp": lambda: exact_exp(np.arange(-16, step, step)),
    }[name]()
    return np.rint(values / step) * step
