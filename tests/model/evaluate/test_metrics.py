"""PSNR and SSIM against scikit-image and against hand-written values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vidmem_model.evaluate.metrics import psnr, ssim


def noisy_pair(shape, dtype):
    rng = np.random.default_rng(7)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    base = 0.5 + 0.3 * np.sin(rows / 5) * np.cos(columns / 7)
    if len(shape) == 3:
        base = base[..., None] * np.linspace(0.6, 1.0, shape[2])
    other = np.clip(base + rng.normal(0, 0.06, shape), 0, 1)
    if dtype == np.uint8:
        return (base * 255).round().astype(np.uint8), (other * 255).round().astype(np.uint8)
    return base.astype(dtype), other.astype(dtype)


@pytest.mark.parametrize("shape", [(48, 64, 3), (11, 11, 3), (37, 53), (40, 12, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_both_equal_scikit_image(shape, dtype):
    skimage = pytest.importorskip("skimage.metrics")
    a, b = noisy_pair(shape, dtype)
    peak = 255 if dtype == np.uint8 else 1.0
    exact = [x.astype(np.float64) for x in (a, b)]
    assert psnr(a, b) == pytest.approx(skimage.peak_signal_noise_ratio(*exact, data_range=peak), abs=1e-9)
    expected = skimage.structural_similarity(
        *exact,
        data_range=peak,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=2 if len(shape) == 3 else None,
    )
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, abs=1e-9)


def test_photograph_with_less_contrast_equals_scikit_image():
    skimage = pytest.importorskip("skimage")
    photo = skimage.data.astronaut()[100:228, 150:310]
    dull = (photo.astype(np.float64) * 0.7 + 20).round().astype(np.uint8)
    expected = skimage.metrics.structural_similarity(
        photo,
        dull,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=2,
    )
    assert ssim(photo, dull) == pytest.approx(expected, abs=1e-9)
    assert 0.5 < ssim(photo, dull) < 0.99


def test_psnr_of_a_known_error():
    a = torch.zeros(4, 5, 3, dtype=torch.uint8)
    b = torch.full_like(a, 51)
    assert psnr(a, b) == pytest.approx(20 * math.log10(5))
    assert psnr(a.float(), b.float() / 255) == pytest.approx(20 * math.log10(5), abs=1e-5)
    assert psnr(a, b, data_range=510) == pytest.approx(20 * math.log10(10))


def test_equal_images():
    a, _ = noisy_pair((20, 20, 3), np.uint8)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)


def test_ssim_of_two_flat_images_is_the_luminance_term():
    a = torch.full((16, 16), 100, dtype=torch.uint8)
    b = torch.full((16, 16), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-9)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_mismatched_images_are_refused(measure):
    a = torch.zeros(16, 16, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one shape and dtype"):
        measure(a, a[:12])
    with pytest.raises(ValueError, match="one shape and dtype"):
        measure(a, a.float())
    with pytest.raises(ValueError, match="must not be empty"):
        measure(a[:0], a[:0])
    with pytest.raises(TypeError, match="uint8 or float"):
        measure(a.long(), a.long())
    with pytest.raises(ValueError, match="data_range must be positive"):
        measure(a, a, data_range=0)


def test_ssim_needs_room_for_its_window():
    a = torch.zeros(10, 40, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(a, a)
