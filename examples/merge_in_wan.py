"""Token merging in Wan: one line reduces the keys and values of its self-attention, and another undoes that."""

import time

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from vidmem_kernels.diffusers import apply_token_merging

# The real model, in a pipeline:
#   pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")
#   apply_token_merging(pipe.transformer, kv_ratio=0.5)
#   video = pipe("A cat walks on the grass", num_frames=81).frames[0]


def tiny_wan() -> WanTransformer3DModel:
    """A small Wan with random weights."""
    return WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, text_dim=32, freq_dim=32, ffn_dim=512, num_layers=2
    ).eval()


def smooth_latents(frames: int, height: int, width: int) -> Tensor:
    """Latents (1, 16, frames, height, width) that change slowly in space and time, as those of a video do."""
    small = torch.randn(1, 16, 3, height // 8, width // 8)
    return torch.nn.functional.interpolate(small, size=(frames, height, width), mode="trilinear")


@torch.no_grad()
def timed(model: WanTransformer3DModel, inputs: dict) -> tuple[float, Tensor]:
    """Return the shortest time of three runs, in milliseconds, and the output."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        out = model(**inputs).sample
        times.append(time.perf_counter() - start)
    return min(times) * 1000, out


if __name__ == "__main__":
    torch.manual_seed(0)
    model = tiny_wan()
    inputs = {
        "hidden_states": smooth_latents(5, 32, 48),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 20, 32),
    }
    plain_time, plain = timed(model, inputs)
    print(f"Wan as it was: {plain_time:.0f} ms")
    for ratio in (0.25, 0.5, 0.75):
        with apply_token_merging(model, kv_ratio=ratio) as merging:
            merged_time, merged = timed(model, inputs)
            block = merging.stats()["blocks"][0]
        error = (merged - plain).norm() / plain.norm()
        print(f"{block['keys']} keys of {block['tokens']}: {merged_time:.0f} ms, difference {error:.4f}")
    print(f"taken out: difference {(timed(model, inputs)[1] - plain).norm():.4f}")
