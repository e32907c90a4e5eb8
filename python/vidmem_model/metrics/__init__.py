"""Measures of how close a retrieved frame is to its source."""

from .image import psnr, ssim

__all__ = ["psnr", "ssim"]
