"""Condition Wan on past frames: their patch tokens, or half as many merged ones, join its sequence as memory."""

import torch
from diffusers import WanTransformer3DModel

from vidmem_kernels import match_tokens, merge_tokens
from vidmem_kernels.diffusers import MemoryPrefix, patch_tokens


def tiny_wan() -> WanTransformer3DModel:  # for WanTransformer3DModel.from_pretrained(..., subfolder="transformer")
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=64, num_layers=2,
    ).eval()  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    model = tiny_wan()
    video = torch.nn.functional.interpolate(torch.randn(1, 4, 3, 3, 4), size=(9, 12, 16), mode="trilinear")
    past, now = video[:, :, :6], video[:, :, 6:]
    call = {"timestep": torch.tensor([500]), "encoder_hidden_states": torch.randn(1, 5, 16), "return_dict": False}
    with torch.no_grad():
        alone = model(now, **call)[0]
        whole = model(video, **call)[0][:, :, 6:]  # output for these frames after the past ones

        memory = MemoryPrefix(model)
        tokens, positions = patch_tokens(model, past, start=-6)  # times -6 to -1, before the frames, which start at 0
        memory.set(tokens, positions)
        print(
            f"{tokens.shape[1]} memory tokens: {(model(now, **call)[0] - whole).abs().max():.1e} from the whole video"
        )

        plan = match_tokens(tokens, tokens.shape[1] // 2, grid=(6, 6, 8), window=(1, 1, 1))
        merged, size = merge_tokens(tokens, plan)
        memory.set(merged, positions[plan.kept[0].long()], size=size)
        got = model(now, **call)[0]
        print(
            f"{merged.shape[1]} memory tokens: {(got - whole).norm() / (alone - whole).norm():.2f} of the error without"
        )

        memory.remove()
        print(f"taken out: {(model(now, **call)[0] - alone).abs().max():.1e} from the model without memory")
