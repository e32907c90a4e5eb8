"""Store a video's tokens in a file of int8 rows, and read back only those that match a query."""

import tempfile
from pathlib import Path

import torch

from vidmem_kernels import MemoryBank

if __name__ == "__main__":
    tokens = torch.randn(5460, 256)
    t, h, w = torch.meshgrid(torch.arange(60.0), torch.arange(7.0), torch.arange(13.0), indexing="ij")
    positions = torch.stack([t, h, w], dim=-1).reshape(-1, 3)

    bank = MemoryBank(channels=256, dtype=torch.int8)
    bank.append(tokens, positions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        bank.save(path)
        bank = MemoryBank.load(path)

    _, index = bank.topk(tokens[1234:1235], k=3)
    rows = bank.gather(index.flatten())
    error = (rows[0] - tokens[1234]).abs().max()
    print(f"{len(bank)} rows in {bank.nbytes / 1e6:.2f} MB, best row {index[0, 0].item()}, error {error:.4f}")
