"""Causal layers over latent grids with streaming state, for the VAE and the memory encoder."""

from __future__ import annotations

import torch
from torch import nn


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each cell of (B, C, T, H, W), so that frames stay independent."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, computed in float32 for any dtype of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that is causal in time.

    Args:
        inside: Input channels.
        outside: Output channels.
        kernel: Kernel size (time, height, width).
        stride: Stride (time, height, width). With stride 1 the kernel is centred in space and the size is kept;
            otherwise kernel and stride must be equal in space, so that boxes do not overlap.
    """

    def __init__(
        self, inside: int, outside: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        padding = [(k - 1) // 2 if s == 1 else 0 for k, s in zip(kernel, stride, strict=True)]
        super().__init__(inside, outside, kernel, stride, (0, *padding[1:]))
        self.kept = kernel[0] - stride[0]
        # Keeps the variance; torch's default would reduce it to a third in each layer.
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, past: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve a segment.

        Args:
            x: (B, C, T, H, W), T a multiple of the time stride.
            past: Last inputs of the segment before, as returned; None (zeros) for the first segment.

        Returns:
            Output (B, C', T / stride, H', W'), and the last inputs (B, C, kernel - stride, H, W).
        """
        if past is None:
            past = x.new_zeros(*x.shape[:2], self.kept, *x.shape[3:])
        x = torch.cat([past, x], 2)
        # A copy: a view would keep the whole segment in memory.
        return super().forward(x), x[:, :, x.shape[2] - self.kept :].clone()
