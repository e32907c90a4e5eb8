"""Halve the tokens of a transformer block: merge, run the block, unmerge. Works with any block and torch.compile."""

import torch
from torch import Tensor, nn

from vidmem_kernels import match_tokens, merge_tokens, unmerge_tokens


class MergedBlock(nn.Module):
    """Runs `block` on the merged tokens of a (T, H, W) grid and adds their changes to all tokens."""

    def __init__(self, block: nn.Module, grid: tuple[int, int, int], ratio: float = 0.5):
        super().__init__()
        self.block, self.grid, self.ratio = block, grid, ratio

    def forward(self, x: Tensor) -> Tensor:  # (B, T*H*W, C)
        plan = match_tokens(x.detach(), int(self.ratio * x.shape[1]), grid=self.grid, window=(1, 1, 1))
        merged, _ = merge_tokens(x, plan)
        return x + unmerge_tokens(self.block(merged) - merged, plan)


if __name__ == "__main__":
    grid = (4, 10, 18)
    block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    x = torch.randn(1, 4 * 10 * 18, 64, requires_grad=True)
    out = MergedBlock(block, grid)(x)
    out.square().mean().backward()
    print(f"{x.shape[1]} tokens in, the block saw {x.shape[1] - x.shape[1] // 2}, gradient norm {x.grad.norm():.4f}")
