"""Layers over latent grids that carry a stream from call to call: the VAE's and the memory encoder's."""

from __future__ import annotations

import torch
from torch import nn


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each cell of (B, C, T, H, W): a frame's result depends on no other frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, in float32 whatever the dtype of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that sees no later frame than the last one it strides over.

    Args:
        inside, outside: channels in and out.
        kernel, stride: (time, height, width). Where the stride is 1 the kernel is centred in space and
            the size stays; else kernel and stride must be equal in space, so that no cell of one box
            reaches into another.
    """

    def __init__(
        self, inside: int, outside: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        padding = [(k - 1) // 2 if s == 1 else 0 for k, s in zip(kernel, stride, strict=True)]
        super().__init__(inside, outside, kernel, stride, (0, *padding[1:]))
        self.kept = kernel[0] - stride[0]
        # Variance is kept from layer to layer; torch's default would shrink it to a third each time.
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, past: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve a segment.

        Args:
            x: (B, C, T, H, W), T a multiple of the stride in time.
            past: the last inputs of the segment before, as returned; None (zeros) for the first one.

        Returns:
            (B, C', T / stride, H', W') and the last inputs, (B, C, kernel - stride, H, W).
        """
        if past is None:
            past = x.new_zeros(*x.shape[:2], self.kept, *x.shape[3:])
        x = torch.cat([past, x], 2)
        # A copy: a view would keep the whole segment in memory.
        return super().forward(x), x[:, :, x.shape[2] - self.kept :].clone()
