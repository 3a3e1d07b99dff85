from __future__ import annotations

import numpy as np
import pytest

from mlic.bdrate import bd_psnr, bd_rate, compare_curves
from mlic.errors import MlicError, ResultsError
from mlic.published import dataset_of, datasets, published_curves

ANCHOR = [(0.1, 29.0), (0.2, 31.2), (0.4, 34.1), (0.8, 37.0), (1.4, 39.9)]
TEST = [(0.11, 29.6), (0.19, 31.9), (0.35, 34.4), (0.7, 36.8)]


@pytest.mark.parametrize(
    "dataset, reported",  # by the authors: MLIC, MLIC+, MLIC++
    [("kodak", (-8.05, -11.39, -13.39)), ("tecnick", (-12.73, -16.38, -17.59)), ("clic-pro-val", (-8.79, -12.56, -13.08))],
)
def test_the_published_points_give_the_published_rates(dataset, reported):
    curves = published_curves(dataset)
    names = ("mlic-published", "mlic+-published", "mlic++-published")
    rates = [bd_rate(curves["vtm-17.0"].points, curves[name].points) for name in names]
    assert rates == pytest.approx(reported, abs=0.15)


@pytest.mark.parametrize("method", ["cubic", "pchip"])
def test_agrees_with_the_bjontegaard_package(method):
    reference = pytest.importorskip("bjontegaard")
    pytest.importorskip("scipy")
    curves = published_curves("kodak")
    for name in ("mlic++-published", "vtm-9.1", "jpeg-published", "evc-ll"):
        a, b = curves["vtm-17.0"].points, curves[name].points
        columns = [np.array(column) for points in (a, b) for column in zip(*points)]
        theirs = [f(*columns, method=method, require_matching_points=False, min_overlap=0)
                  for f in (reference.bd_rate, reference.bd_psnr)]  # fmt: skip
        assert [bd_rate(a, b, method=method), bd_psnr(a, b, method=method)] == pytest.approx(theirs, abs=1e-6)


def test_fixed_values():  # computed with the package bjontegaard 1.3.0
    pytest.importorskip("scipy")
    assert bd_rate(ANCHOR, TEST) == pytest.approx(-17.5896729, abs=1e-6)
    assert bd_rate(ANCHOR, TEST, method="pchip") == pytest.approx(-17.4937526, abs=1e-6)
    assert bd_psnr(ANCHOR, TEST) == pytest.approx(0.7592703, abs=1e-6)
    assert bd_psnr(ANCHOR, TEST, method="pchip") == pytest.approx(0.7530236, abs=1e-6)


def test_by_hand():
    """Two straight lines in log rate: 1 dB apart, 10 dB a factor of ten, so the rate is 10^0.1 apart."""
    line = [(10 ** (p / 10), p) for p in (1, 3, 6, 8)]
    better = [(rate, p + 1) for rate, p in line]
    assert bd_rate(line, better) == pytest.approx(100 * (10**-0.1 - 1))
    assert bd_psnr(line, better) == pytest.approx(1)
    assert bd_rate(better, line) == pytest.approx(100 * (10**0.1 - 1))
    assert bd_rate(line, line[::-1]) == pytest.approx(0, abs=1e-9)  # order does not matter


def test_overlaps():
    delta = compare_curves(ANCHOR, TEST)
    assert delta.overlap == (29.6, 36.8)
    assert delta.rate_overlap == pytest.approx((0.11, 0.7))
    assert delta.warnings == ()
    assert delta.rate_cubic == pytest.approx(bd_rate(ANCHOR, TEST))


def test_small_overlap_is_warned_of():
    high = [(rate * 8, psnr + 6) for rate, psnr in TEST]  # 35.6 to 42.8 dB, of which ANCHOR reaches 39.9
    assert compare_curves(ANCHOR, high).warnings == ()
    higher = [(rate * 8, psnr + 7) for rate, psnr in TEST]
    (warning,) = compare_curves(ANCHOR, higher).warnings
    assert "small overlap: 36.60 to 39.90 dB, 46% of the smaller" in warning


def test_no_overlap():
    delta = compare_curves(ANCHOR, [(rate * 100, psnr + 20) for rate, psnr in TEST])
    assert (delta.rate_cubic, delta.rate_pchip, delta.psnr_cubic, delta.overlap) == (None,) * 4
    assert delta.warnings == ("no common PSNR: no BD-rate", "no common rate: no BD-PSNR")
    with pytest.raises(MlicError, match="no common PSNR"):
        bd_rate(ANCHOR, [(rate, psnr + 20) for rate, psnr in TEST])


def test_a_curve_that_falls_is_warned_of():
    folded = [*TEST[:2], (0.3, 31.5), *TEST[2:]]
    assert any("not monotone: PSNR falls from 31.90 to 31.50" in text for text in compare_curves(ANCHOR, folded).warnings)
    assert any("anchor not monotone" in text for text in compare_curves(folded, ANCHOR).warnings)


def test_few_points():
    delta = compare_curves(ANCHOR, TEST[:3])
    assert delta.rate_cubic is None and delta.psnr_cubic is None
    assert "only 3 points: no cubic fit" in delta.warnings
    with pytest.raises(MlicError, match="cubic fit needs 4 points, not 3"):
        bd_rate(ANCHOR, TEST[:3])
    for function in (bd_rate, bd_psnr, compare_curves):
        with pytest.raises(MlicError, match="one quality point only"):
            function(ANCHOR, TEST[:1])


@pytest.mark.parametrize("points", [[(0, 30), (1, 31)], [(0.1, float("inf")), (1, 31)], [(0.1, 30, 1), (1, 31, 1)], []])
def test_nonsense_is_refused(points):
    with pytest.raises(MlicError):
        bd_rate(ANCHOR, points)


def test_published_points_are_complete():
    for dataset in datasets():
        for curve in published_curves(dataset.name).values():
            assert curve.source and len(curve.points) >= 4 and len(curve.ms_ssim_db) == len(curve.points)
            assert list(curve.points) == sorted(curve.points)
    with pytest.raises(ResultsError, match="no published curves of 'lena'; there are kodak"):
        published_curves("lena")
    assert dataset_of(["0"]) is None
