"""PSNR and SSIM of images."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

_TAPS = 11
_SIGMA = 1.5


def _prepare(
    op: str, a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray, data_range: float | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"{op}: both images must have one shape and dtype, "
            f"got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
        )
    if a.numel() == 0:
        raise ValueError(f"{op}: images must not be empty, got {tuple(a.shape)}")
    if a.dtype != torch.uint8 and not a.dtype.is_floating_point:
        raise TypeError(f"{op}: images must be uint8 or float, got {a.dtype}")
    if data_range is None:
        data_range = 255.0 if a.dtype == torch.uint8 else 1.0
    if not (math.isfinite(data_range) and data_range > 0):
        raise ValueError(f"{op}: data_range must be positive, got {data_range}")
    return a.to(torch.float64), b.to(torch.float64), float(data_range)


def psnr(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio (PSNR) of two images, in decibels, computed in float64.

    Args:
        a: Image of any shape, uint8 or float.
        b: Image of the same shape and dtype.
        data_range: Largest possible value; by default 255 for uint8, 1 for float.

    Returns:
        10 log10(data_range^2 / mean squared error); infinity for equal images.

    Raises:
        ValueError: Shapes or dtypes differ, images are empty, or data_range is not positive.
        TypeError: Images are neither uint8 nor float.
    """
    a, b, data_range = _prepare("psnr", a, b, data_range)
    error = (a - b).square().mean().item()
    return math.inf if error == 0 else 10.0 * math.log10(data_range**2 / error)


def _blur(planes: torch.Tensor) -> torch.Tensor:
    """Gaussian means (N, 1, H, W) over windows inside the image."""
    offset = torch.arange(_TAPS, dtype=planes.dtype) - _TAPS // 2
    window = torch.exp(-offset.square() / (2 * _SIGMA**2))
    window /= window.sum()
    return F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def ssim(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray, data_range: float | None = None) -> float:
    """Structural similarity (SSIM) of two images, the mean over windows and colours, computed in float64.

    Windows are 11x11 Gaussians of sigma 1.5 inside the image; K1 = 0.01, K2 = 0.03 (Wang, Bovik, Sheikh, Simoncelli:
    Image quality assessment, IEEE TIP 13(4), 2004).

    Args:
        a: Image (H, W) or (H, W, C), uint8 or float; H and W are at least 11.
        b: Image of the same shape and dtype.
        data_range: Largest possible value; by default 255 for uint8, 1 for float.

    Returns:
        Mean SSIM, 1 for equal images.

    Raises:
        ValueError: Shapes or dtypes differ, images are too small, or data_range is not positive.
        TypeError: Images are neither uint8 nor float.
    """
    a, b, data_range = _prepare("ssim", a, b, data_range)
    if a.ndim not in (2, 3) or min(a.shape[:2]) < _TAPS:
        raise ValueError(
            f"ssim: images must be (H, W) or (H, W, C) with H and W at least {_TAPS}, got {tuple(a.shape)}"
        )
    height, width = a.shape[:2]
    a, b = (x.reshape(height, width, -1).permute(2, 0, 1)[:, None] for x in (a, b))
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a * mean_a
    var_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean().item()
