"""Memory of linear attention's CPU kernel over a minute of video: hardly more than its inputs and its result."""

import subprocess
import sys

import pytest

from vidmem_kernels import _extension

FORWARD = """
import torch
from vidmem_kernels import linear_attention
from vidmem_kernels.peak_memory import PeakMemory

FRAMES, TOKENS, HEADS, SIZE = 360, 1560, 4, 32
warm = torch.ones(1, TOKENS, HEADS, SIZE)
linear_attention(warm, warm, warm, causal=True, block_size=TOKENS)  # loads what is loaded once
with PeakMemory() as peak:
    q, k, v = (torch.ones(1, FRAMES * TOKENS, HEADS, SIZE) for _ in range(3))
    frame = torch.arange(FRAMES, dtype=torch.float32)
    v.view(FRAMES, -1).mul_(frame[:, None])
    out = linear_attention(q, k, v, causal=True, block_size=TOKENS)
# Equal weights: frame f is the mean of the frames up to it, f / 2.
error = (out.view(FRAMES, -1) - frame[:, None] / 2).abs().amax(1)
assert (error <= 1e-4 * (frame + 1)).all(), error.max()
print(peak.grown_bytes / (4 * q.nbytes))
"""


@pytest.mark.skipif(not _extension.has_kernel("linear_attention", "cpu"), reason="no C++ kernel of linear attention")
def test_forward_over_a_minute_holds_little_more_than_its_tensors():
    """561,600 tokens, 360 frames of 30 x 52: q, k, v and the result take 1.1 GiB; at most a fifth comes on top."""
    run = subprocess.run([sys.executable, "-c", FORWARD], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) <= 1.2
