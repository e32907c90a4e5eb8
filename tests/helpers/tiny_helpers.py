"""A tiny model with random weights, and a film in its size."""

import dataclasses

import torch

from vidmem_model.model.config import PRESETS
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.vae.config import VAEConfig

CONFIG = dataclasses.replace(PRESETS["tiny"], vae=VAEConfig(kind="dct", channels=8))


def film(frames=24, seed=0):
    """A soft pattern that moves, in the size of the tiny model."""
    small = torch.rand(1, 3, 5, 9, generator=torch.Generator().manual_seed(seed))
    big = torch.nn.functional.interpolate(small, size=(32 + frames, 64), mode="bicubic", align_corners=False)[0]
    images = torch.stack([big[:, i : i + 32] for i in range(frames)])
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def tiny_model(seed=0, **encoder):
    torch.manual_seed(seed)
    encoders = (dataclasses.replace(CONFIG.encoders[0], **encoder),)
    model = MemoryModel(dataclasses.replace(CONFIG, encoders=encoders))
    for weight in model.parameters():  # a new model's last layers are zero, and all models alike
        torch.nn.init.normal_(weight, std=0.1)
    return model
