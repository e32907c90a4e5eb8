"""Attention over a video in segments: linear attention keeps a state, softmax attention merges partial results."""

import torch

from vidmem_kernels import cross_attention, linear_attention, merge_attention_states

if __name__ == "__main__":
    frame, frames, heads, size = 40, 12, 4, 32
    q, k, v = (torch.randn(1, frames * frame, heads, size) for _ in range(3))

    whole = linear_attention(q, k, v, causal=True, block_size=frame)
    state, parts = None, []
    for segment in range(0, frames * frame, 3 * frame):  # three frames at a time
        now = slice(segment, segment + 3 * frame)
        out, state = linear_attention(
            q[:, now], k[:, now], v[:, now], causal=True, block_size=frame, state=state, return_state=True
        )
        parts.append(out)
    print(f"linear attention, segments against whole: {(torch.cat(parts, 1) - whole).abs().max():.1e}")

    memory, recent = slice(0, 9 * frame), slice(9 * frame, None)
    outs, lses = zip(*(cross_attention(q, k[:, s], v[:, s], return_lse=True) for s in (memory, recent)), strict=True)
    merged, _ = merge_attention_states(list(outs), list(lses))
    whole = cross_attention(q, k, v)
    print(f"softmax attention, memory and recent frames against whole: {(merged - whole).abs().max():.1e}")
