"""Bjontegaard's delta: how much more rate a codec needs than another, averaged over the qualities both reach.

Bjontegaard, "Calculation of average PSNR differences between RD-curves" (VCEG-M33, 2001): curves of log rate over PSNR
are integrated over their common PSNR interval. "cubic" fits one polynomial of third degree to all points, as in that
paper and in the MLIC papers; "pchip" joins the points by monotone cubic pieces (Fritsch and Carlson 1980; JVET's
practice), which is safer for many points over a wide range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from .errors import MlicError

Method = Literal["cubic", "pchip"]
Points = Sequence[Sequence[float]]  # (bits per pixel, dB) pairs, in any order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """A codec against an anchor. A figure is None where it cannot be had; `warnings` then says why.

    `rate_*` are BD-rates in percent, negative where the codec needs fewer bits; `psnr_*` are BD-PSNRs in dB, positive
    where it is better. `overlap` is the common quality interval in dB, behind the BD-rates, and `rate_overlap` the
    common rate interval in bits per pixel, behind the BD-PSNRs.
    """

    rate_cubic: float | None
    rate_pchip: float | None
    psnr_cubic: float | None
    psnr_pchip: float | None
    overlap: tuple[float, float] | None
    rate_overlap: tuple[float, float] | None
    warnings: tuple[str, ...]


def bd_rate(anchor: Points, test: Points, *, method: Method = "cubic") -> float:
    """Mean rate difference of `test` to `anchor` at equal PSNR, in percent; negative: `test` needs fewer bits.

    Points are (rate, PSNR) pairs: rate in any unit above 0, PSNR in dB. Raises MlicError for fewer than two
    points, for the cubic fit four, rates that are not positive, or no common PSNR.

    >>> anchor = [(0.1, 29), (0.2, 31), (0.4, 34), (0.8, 37)]
    >>> round(bd_rate(anchor, [(0.9 * rate, psnr) for rate, psnr in anchor]), 6)
    -10.0
    """
    return float(np.expm1(_difference(anchor, test, "PSNR", method)) * 100)


def bd_psnr(anchor: Points, test: Points, *, method: Method = "cubic") -> float:
    """Mean PSNR difference of `test` to `anchor` at equal rate, in dB; positive: `test` is better.

    Arguments and errors as `bd_rate`'s; the mean is over the logarithm of the rate.

    >>> anchor = [(0.1, 29), (0.2, 31), (0.4, 34), (0.8, 37)]
    >>> round(bd_psnr(anchor, [(rate, psnr + 0.5) for rate, psnr in anchor], method="pchip"), 6)
    0.5
    """
    return _difference(anchor, test, "rate", method)


def compare_curves(anchor: Points, test: Points) -> Delta:
    """All deltas of `test` to `anchor`, with warnings for what makes them doubtful. Raises MlicError for one point only.

    >>> anchor = [(0.1, 29), (0.2, 31), (0.4, 34), (0.8, 37)]
    >>> compare_curves(anchor, anchor[:2] + [(0.4, 33.9), (0.5, 33.5)]).warnings
    ('not monotone: PSNR falls from 33.90 to 33.50 dB as the rate rises',)
    """
    anchor, test = _points(anchor), _points(test)
    warnings = [f"anchor {text}" for text in _monotony(anchor)] + _monotony(test)
    few = min(len(anchor), len(test))
    if few < 4:
        warnings.append(f"only {few} points: no cubic fit")
    if overlap := _overlap(anchor[:, 1], test[:, 1]):
        share = (overlap[1] - overlap[0]) / min(np.ptp(anchor[:, 1]), np.ptp(test[:, 1]))
        if share < 0.5:
            warnings.append(f"small overlap: {overlap[0]:.2f} to {overlap[1]:.2f} dB, {share:.0%} of the smaller curve's range")
    else:
        warnings.append("no common PSNR: no BD-rate")
    rates = _overlap(np.log(anchor[:, 0]), np.log(test[:, 0]))
    if not rates:
        warnings.append("no common rate: no BD-PSNR")

    def figure(delta: Callable[..., float], method: Method, possible: object) -> float | None:
        if not possible or (method == "cubic" and few < 4):
            return None
        try:
            return delta(anchor, test, method=method)
        except MlicError as error:
            warnings.append(f"no {method} {'BD-rate' if delta is bd_rate else 'BD-PSNR'}: {error}")
            return None

    return Delta(
        rate_cubic=figure(bd_rate, "cubic", overlap),
        rate_pchip=figure(bd_rate, "pchip", overlap),
        psnr_cubic=figure(bd_psnr, "cubic", rates),
        psnr_pchip=figure(bd_psnr, "pchip", rates),
        overlap=overlap,
        rate_overlap=rates and (float(np.exp(rates[0])), float(np.exp(rates[1]))),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _points(points: Points) -> np.ndarray:
    """(N, 2) float64, sorted by rate."""
    array = np.asarray(points, np.float64)
    if len(array) < 2:
        has = "one quality point only" if len(array) else "no point"
        raise MlicError(f"a BD-rate needs a curve, and this one has {has}: measure at least 4")
    if array.ndim != 2 or array.shape[1] != 2:
        raise MlicError(f"a curve is a list of (rate, PSNR) pairs, not an array of shape {array.shape}")
    if not (np.isfinite(array).all() and (array[:, 0] > 0).all()):
        raise MlicError("every point of a curve needs a rate above 0 and a finite PSNR")
    return array[np.lexsort((array[:, 1], array[:, 0]))]


def _monotony(points: np.ndarray) -> list[str]:
    for (_, before), (_, after) in zip(points, points[1:]):
        if after <= before:
            falls = f"falls from {before:.2f} to {after:.2f} dB" if after < before else f"stays at {before:.2f} dB"
            return [f"not monotone: PSNR {falls} as the rate rises"]
    return []


def _overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float] | None:
    low, high = max(a.min(), b.min()), min(a.max(), b.max())
    return (float(low), float(high)) if low < high else None


def _difference(anchor: Points, test: Points, axis: Literal["PSNR", "rate"], method: Method) -> float:
    """Mean difference of log rate at equal PSNR, or of PSNR at equal log rate, over the common interval of that axis."""
    curves = [(np.log(rates), psnrs) for rates, psnrs in (_points(anchor).T, _points(test).T)]
    (x, y), (x_test, y_test) = curves if axis == "rate" else [curve[::-1] for curve in curves]
    common = _overlap(x, x_test)
    if not common:
        raise MlicError(f"the curves have no common {axis}")
    return _mean(x_test, y_test, *common, method) - _mean(x, y, *common, method)


def _mean(x: np.ndarray, y: np.ndarray, low: float, high: float, method: Method) -> float:
    """Mean of y over low..high, x being an increasing function's argument up to order."""
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    if method == "cubic":
        if (count := len(np.unique(x))) < 4:
            raise MlicError(f"a cubic fit needs 4 points, not {count}")
        centre = x.mean()  # for a well-conditioned fit
        primitive = np.polyint(np.polyfit(x - centre, y, 3))
        area = np.polyval(primitive, high - centre) - np.polyval(primitive, low - centre)
    elif method == "pchip":
        if (np.diff(x) <= 0).any():
            raise MlicError("two points have the same place on the axis")
        try:
            from scipy.interpolate import PchipInterpolator
        except ImportError:
            raise MlicError("PCHIP needs the package scipy: pip install 'mlic[eval]'") from None
        area = PchipInterpolator(x, y).integrate(low, high)
    else:
        raise ValueError(f"method must be 'cubic' or 'pchip', not {method!r}")
    return float(area) / (high - low)
