"""Give Wan a memory of past frames: train only cross-attention to it, save it, and load it into another Wan."""

import tempfile
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from vidmem_kernels import match_tokens, merge_tokens
from vidmem_kernels.diffusers import add_memory_attention, load_memory_adapter, patch_tokens


def tiny_wan() -> WanTransformer3DModel:  # for WanTransformer3DModel.from_pretrained(..., subfolder="transformer")
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=64, num_layers=2,
    ).requires_grad_(False)  # fmt: skip


def remember(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge half of the patch tokens of past latents; return tokens (B, M, C) and the number of tokens in each."""
    tokens, _ = patch_tokens(model, latents)
    grid = [size // patch for size, patch in zip(latents.shape[2:], model.config.patch_size, strict=True)]
    return merge_tokens(tokens, match_tokens(tokens, tokens.shape[1] // 2, grid=grid, window=(1, 1, 1)))


if __name__ == "__main__":
    model = tiny_wan()
    past, now = torch.randn(2, 4, 6, 8, 8), torch.randn(2, 4, 3, 8, 8)
    call = {"timestep": torch.tensor([500, 500]), "encoder_hidden_states": torch.randn(2, 5, 16), "return_dict": False}
    before = model(now, **call)[0]

    m = add_memory_attention(model, encoder=remember)
    m.remember(past)
    print(f"changed by the closed gate: {(model(now, **call)[0] - before).abs().max():.1e}")

    target = before + past.mean((2, 3, 4), keepdim=True)  # a target that depends on the past
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for step in range(61):
        loss = nn.functional.mse_loss(model(now, **call)[0], target)
        if step % 30 == 0:
            print(f"step {step}: loss {loss.item():.2e}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    trained = model(now, **call)[0]
    with tempfile.TemporaryDirectory() as folder:
        m.save(Path(folder, "memory.safetensors"))
        other = tiny_wan()
        load_memory_adapter(other, Path(folder, "memory.safetensors"), encoder=remember).remember(past)
    print(f"changed by saving and loading: {(other(now, **call)[0] - trained).abs().max():.1e}")
    m.remove()
    print(f"changed by removal: {(model(now, **call)[0] - before).abs().max():.1e}")
