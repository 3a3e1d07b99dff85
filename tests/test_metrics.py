from __future__ import annotations

import math

import numpy as np
import pytest

from mlic.metrics import MS_SSIM_MIN_SIDE, ms_ssim, ms_ssim_db, ms_ssim_tensor, psnr


def picture_pair(height: int = 190, width: int = 203) -> tuple[np.ndarray, np.ndarray]:
    """A picture of ramps and squares, and the same with integer noise; odd sizes at several scales."""
    y, x, c = np.ogrid[:height, :width, :3]
    clean = 40 + (x * (c + 1) + 2 * y) % 120 + 60 * ((x // 24 + y // 24) % 2)
    noise = (x * x * 7919 + y * y * 104729 + x * y * 31 + c * 1299709) % 41 - 20
    return clean.astype(np.uint8), (clean + noise).clip(0, 255).astype(np.uint8)


def test_psnr_by_hand():
    a = np.zeros((2, 2, 3), np.uint8)
    b = a.copy()
    b[0, 0] = (3, 0, 255)
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / ((9 + 255**2) / 12)))
    assert psnr(b, a) == psnr(a, b)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + np.uint8(255)) == 0


def test_ms_ssim_fixed_value():
    assert ms_ssim(*picture_pair()) == pytest.approx(0.96823, abs=1e-5)  # computed with pytorch-msssim 1.0.0


def test_ms_ssim_range():
    a, b = picture_pair()
    assert ms_ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert ms_ssim(a, a) <= 1
    assert ms_ssim(a, 255 - a) == 0
    smallest = (MS_SSIM_MIN_SIDE, MS_SSIM_MIN_SIDE)
    assert 0 < ms_ssim(*picture_pair(*smallest)) < 1


@pytest.mark.parametrize("size", [(190, 203), (161, 161), (176, 320), (255, 163)])
def test_ms_ssim_agrees_with_pytorch_msssim(size):
    reference = pytest.importorskip("pytorch_msssim")
    torch = pytest.importorskip("torch")
    a, b = picture_pair(*size)
    for other in (b, np.roll(a, 1, axis=1), (b // 64 * 64).astype(np.uint8)):
        x, y = (torch.from_numpy(p.transpose(2, 0, 1).copy())[None].double() for p in (a, other))
        assert ms_ssim(a, other) == pytest.approx(float(reference.ms_ssim(x, y, data_range=255)), abs=1e-5)


def test_ms_ssim_tensor_gradient_and_range():
    torch = pytest.importorskip("torch")
    a, b = (torch.from_numpy(p.transpose(2, 0, 1).copy())[None].double() for p in picture_pair(161, 164))
    whole = ms_ssim_tensor(a, b, 255.0)
    assert float(ms_ssim_tensor(a / 255, b / 255, 1.0)) == pytest.approx(float(whole), abs=1e-9)
    assert float(ms_ssim_tensor(torch.cat([a, a]), torch.cat([b, a]), 255.0)) == pytest.approx((float(whole) + 1) / 2)

    b.requires_grad_()
    (gradient,) = torch.autograd.grad(ms_ssim_tensor(a, b, 255.0), b)
    step = 1e-3 * gradient / gradient.abs().max()
    with torch.no_grad():
        change = ms_ssim_tensor(a, b + step, 255.0) - ms_ssim_tensor(a, b - step, 255.0)
    assert float(change) == pytest.approx(2 * float((gradient * step).sum()), rel=1e-3)

    inverted = (255 - a).requires_grad_()
    (gradient,) = torch.autograd.grad(ms_ssim_tensor(a, inverted, 255.0), inverted)
    assert torch.isfinite(gradient).all()


def test_ms_ssim_tensor_stays_in_float32_under_autocast():
    torch = pytest.importorskip("torch")
    x, y = (torch.from_numpy(p.transpose(2, 0, 1).copy())[None].float() / 255 for p in picture_pair(161, 164))
    with torch.autocast("cpu", torch.bfloat16):
        value = ms_ssim_tensor(x, y, 1.0)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(ms_ssim_tensor(x.double(), y.double(), 1.0)), abs=1e-5)


def test_ms_ssim_db():
    assert ms_ssim_db(0.9) == pytest.approx(10)
    assert ms_ssim_db(0) == 0
    assert ms_ssim_db(1) == math.inf


@pytest.mark.parametrize("metric", [psnr, ms_ssim])
def test_errors(metric):
    a = np.zeros((170, 180, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\(170, 180, 3\) and \(180, 170, 3\)"):
        metric(a, a.transpose(1, 0, 2))
    with pytest.raises(ValueError, match="HWC"):
        metric(a[..., 0], a[..., 0])
    with pytest.raises(ValueError, match="HWC"):
        metric(a[:0], a[:0])
    with pytest.raises(ValueError, match="uint8.*float64"):
        metric(a, a.astype(float))


def test_ms_ssim_errors():
    torch = pytest.importorskip("torch")
    small = np.zeros((160, 400, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 161 pixels, got 160 x 400"):
        ms_ssim(small, small)
    with pytest.raises(ValueError, match="BCHW"):
        ms_ssim_tensor(torch.zeros(3, 170, 170), torch.zeros(3, 170, 170), 1.0)
    with pytest.raises(ValueError, match="float"):
        ms_ssim_tensor(torch.zeros(1, 3, 170, 170, dtype=torch.uint8), torch.zeros(1, 3, 170, 170), 1.0)
