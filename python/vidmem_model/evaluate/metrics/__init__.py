"""Measures of how close a retrieved frame is to its source."""

from .image import psnr, ssim
from .stlpips import stlpips

__all__ = ["psnr", "ssim", "stlpips"]
