"""Give a trained block a memory: merged tokens of past frames, read by gated cross-attention."""

import torch
from torch import Tensor, nn

from vidmem_kernels import MemoryCrossAttention, match_tokens, merge_tokens


class BlockWithMemory(nn.Module):
    """Reads a memory by cross-attention, then runs `block`. At first, with a gate of 0, it equals `block` bitwise."""

    def __init__(self, block: nn.Module, dim: int, num_heads: int):
        super().__init__()
        self.block, self.read = block, MemoryCrossAttention(dim, num_heads)

    def forward(self, x: Tensor, memory: Tensor, size: Tensor) -> Tensor:  # (B, L, C), (B, M, C), (B, M)
        return self.block(self.read(x, memory, key_bias=size.log()))  # a merged token gets the weight of its size


if __name__ == "__main__":
    torch.manual_seed(0)
    grid, dim = (8, 6, 10), 64
    past, now = torch.randn(1, 8 * 6 * 10, dim), torch.randn(1, 2 * 6 * 10, dim)
    memory, size = merge_tokens(past, match_tokens(past, past.shape[1] // 2, grid=grid, window=(1, 1, 1)))

    block = nn.TransformerEncoderLayer(dim, 4, 128, dropout=0.0, batch_first=True)
    model = BlockWithMemory(block, dim, 4)
    print(f"{past.shape[1]} past tokens, {memory.shape[1]} in memory, of {int(size.sum())}")
    print(f"changed by the closed gate: {(model(now, memory, size) - block(now)).abs().max():.1e}")

    for p in block.parameters():  # the trained block stays frozen
        p.requires_grad_(False)
    target = block(now + past.mean(1, keepdim=True))  # a target that depends on the past
    optimizer = torch.optim.AdamW(model.read.parameters(), lr=1e-2)
    for step in range(61):
        loss = nn.functional.mse_loss(model(now, memory, size), target)
        if step % 30 == 0:
            print(f"step {step}: loss {loss.item():.2e}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
