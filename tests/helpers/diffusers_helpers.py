"""Tiny diffusers video models with random weights, and inputs for them by the grid of their tokens.

`MODELS` has a maker for every layout: Wan text-to-video (1.3B and 14B are built alike), Wan 2.2-5B (a time for every
token), Wan image-to-video (image context of its own projections), HunyuanVideo, its image-to-video that replaces the
first frame's tokens, FramePack. `inputs_of` gives keyword arguments for any of them.
"""

import torch
from diffusers import (
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)

CHANNELS, TEXT, HEADS, HEAD_SIZE = 4, 16, 2, 12
IMAGE_TOKENS = 5
POOLED = 9  # odd, as no height and width is: torch.compile takes equal sizes for one


def tiny_wan(layers=3, seed=0, **config):
    torch.manual_seed(seed)
    config = {"in_channels": CHANNELS, "out_channels": CHANNELS, **config}
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_SIZE, text_dim=TEXT, freq_dim=16, ffn_dim=32,
        num_layers=layers, rope_max_seq_len=64, **config,
    )  # fmt: skip
    return model.eval()


def tiny_wan_ti2v(layers=3, seed=0):
    """The layout of Wan 2.2-5B; `inputs_of` gives it a time for every token."""
    model = tiny_wan(layers, seed)
    model.expand_timesteps = True
    return model


def tiny_wan_i2v(layers=3, seed=0):
    """With image context, of `IMAGE_TOKENS` tokens before the 512 of the text."""
    return tiny_wan(layers, seed, image_dim=POOLED, added_kv_proj_dim=HEADS * HEAD_SIZE, in_channels=2 * CHANNELS)


def _hunyuan(model_class, layers, seed, **config):
    torch.manual_seed(seed)
    model = model_class(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, attention_head_dim=HEAD_SIZE,
        num_layers=layers, num_single_layers=layers, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT,
        pooled_projection_dim=POOLED, rope_axes_dim=(4, 4, 4), **config,
    )  # fmt: skip
    return model.eval()


def tiny_hunyuan(layers=2, seed=0, **config):
    """`layers` blocks with projections of their own for the text, and as many without."""
    return _hunyuan(HunyuanVideoTransformer3DModel, layers, seed, **config)


def tiny_hunyuan_i2v(layers=2, seed=0):
    return tiny_hunyuan(layers, seed, image_condition_type="token_replace")


def tiny_framepack(layers=2, seed=0):
    return _hunyuan(
        HunyuanVideoFramepackTransformer3DModel, layers, seed,
        has_image_proj=True, image_proj_dim=POOLED, has_clean_x_embedder=True,
    )  # fmt: skip


MODELS = {
    "wan": tiny_wan,
    "wan-ti2v": tiny_wan_ti2v,
    "wan-i2v": tiny_wan_i2v,
    "hunyuan": tiny_hunyuan,
    "hunyuan-i2v": tiny_hunyuan_i2v,
    "framepack": tiny_framepack,
}


def _randn(generator, *shape):
    return torch.randn(*shape, generator=generator)


def _wan_inputs(model, latents, batch, draw):
    inputs = {
        "hidden_states": latents,
        "timestep": torch.randint(0, 1000, (batch,), generator=draw),
        "encoder_hidden_states": _randn(draw, batch, 512 if model.config.image_dim else 6, TEXT),
    }
    if getattr(model, "expand_timesteps", False):
        tokens = latents[0, 0].numel() // 4
        inputs["timestep"] = torch.randint(0, 1000, (batch, tokens), generator=draw)
    if model.config.image_dim:
        inputs["encoder_hidden_states_image"] = _randn(draw, batch, IMAGE_TOKENS, model.config.image_dim)
    return inputs


def _hunyuan_inputs(model, latents, batch, draw):
    lengths = torch.tensor([7 - 2 * (i % 3) for i in range(batch)])  # texts of different lengths
    inputs = {
        "hidden_states": latents,
        "timestep": torch.randint(0, 1000, (batch,), generator=draw),
        "encoder_hidden_states": _randn(draw, batch, 7, TEXT),
        "encoder_attention_mask": (torch.arange(7) < lengths[:, None]).long(),
        "pooled_projections": _randn(draw, batch, POOLED),
        "guidance": torch.full((batch,), 6.0),
    }
    if isinstance(model, HunyuanVideoFramepackTransformer3DModel):
        frames, height, width = latents.shape[2:]
        inputs |= {
            "image_embeds": _randn(draw, batch, 3, POOLED),
            "indices_latents": torch.arange(9, 9 + frames),
            "latents_clean": _randn(draw, batch, CHANNELS, 2, height, width),
            "indices_latents_clean": torch.tensor([0, 8]),
            "latents_history_2x": _randn(draw, batch, CHANNELS, 2, height, width),
            "indices_latents_history_2x": torch.arange(5, 7),
            "latents_history_4x": _randn(draw, batch, CHANNELS, 4, height, width),
            "indices_latents_history_4x": torch.arange(1, 5),
        }
    return inputs


def inputs_of(model, grid, batch=1, seed=0):
    """Keyword arguments of a forward whose video has a (T, H, W) grid of tokens; every sample has its own."""
    draw = torch.Generator().manual_seed(seed)
    frames, height, width = grid[0], 2 * grid[1], 2 * grid[2]
    latents = _randn(draw, batch, model.config.in_channels, frames, height, width)
    make = _wan_inputs if isinstance(model, WanTransformer3DModel) else _hunyuan_inputs
    return make(model, latents, batch, draw) | {"return_dict": False}


def draw_grid(seed):
    """A small grid of odd and even sides."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(int(torch.randint(low, high, (1,), generator=draw)) for low, high in ((2, 5), (3, 7), (3, 7)))


def sample_of(inputs, i):
    """The inputs of one sample of a batch, as a batch of 1."""
    whole = len(inputs["hidden_states"])
    single = {"indices_latents"} | {name for name in inputs if name.startswith("indices_")}
    return {
        name: x[i : i + 1] if isinstance(x, torch.Tensor) and name not in single and len(x) == whole else x
        for name, x in inputs.items()
    }
