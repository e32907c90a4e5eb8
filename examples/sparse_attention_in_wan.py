"""Run Wan's self-attention with `cross_attention` inside a `with` statement: dense, then block-sparse."""

import torch
from diffusers import WanTransformer3DModel

from vidmem_kernels import topk_blocks
from vidmem_kernels.diffusers import attention_backend

BLOCKS = {"block_size": (32, 16)}  # queries, keys; use (128, 64) on a GPU


def tiny_wan() -> WanTransformer3DModel:  # for WanTransformer3DModel.from_pretrained(..., subfolder="transformer")
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=64, num_layers=2,
    ).eval()  # fmt: skip


def half(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """For every block of queries select the half of the blocks of keys with the highest scores."""
    return topk_blocks(q, k, topk=-(-k.shape[1] // BLOCKS["block_size"][1]) // 2, **BLOCKS)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = tiny_wan()
    call = {"timestep": torch.tensor([500]), "encoder_hidden_states": torch.randn(1, 5, 16), "return_dict": False}
    video = torch.randn(1, 4, 5, 16, 24)
    with torch.no_grad():
        before = model(video, **call)[0]
        with attention_backend(model, "vidmem"):
            dense = model(video, **call)[0]
        with attention_backend(model, "vidmem", only="attn1", block_index=half, **BLOCKS):
            sparse = model(video, **call)[0]
        after = model(video, **call)[0]
    print(f"dense: {(dense - before).abs().max():.1e} from diffusers' own backend")
    print(f"half of the blocks: {(sparse - before).norm() / before.norm():.3f} relative difference")
    print(f"afterwards: {(after - before).abs().max():.1e} from before")
