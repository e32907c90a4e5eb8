"""Image quality metrics: PSNR, SSIM and ST-LPIPS."""

from .image import psnr, ssim
from .stlpips import stlpips

__all__ = ["psnr", "ssim", "stlpips"]
