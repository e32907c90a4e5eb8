"""The whole model: text encoder, memory encoders and DiT, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .dit import DiT, KVCache
from .encoder import MemoryEncoder, MemoryTokens
from .errors import MemoryFormatError
from .flow import sample
from .lora import apply_lora, base_of
from .model_config import ModelConfig
from .text import TextEncoder
from .weights import pack, read_tensors, write_tensors

FORMAT = "vidmem.model"
VERSION = 1
MODEL_FILE = "model.safetensors"
VAE_FILE = "vae.safetensors"
_PRETRAINED = "text.pretrained."  # its weights stay in its own folder


class MemoryModel(nn.Module):
    """Remembers a history as a few tokens and makes latent frames from them.

    Args:
        config: of all parts. The VAE is not among them: it is frozen, and loaded apart.
        text_path: folder of a pretrained text encoder, for `config.text.kind` "transformers".

    Attributes:
        extra: what save_model was given besides the model.
        vae_weights: the VAE's weights beside the file the model came from, or None.

    Raises:
        UserError: the text encoder's folder cannot be used.
    """

    def __init__(self, config: ModelConfig, text_path: str | Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.dit = DiT(config.dit, config.vae.channels, config.text.dim, config.encoders[0].rate)
        self.encoders = nn.ModuleList(
            MemoryEncoder(each, config.dit.dim, config.vae.channels) for each in config.encoders
        )
        self.text = TextEncoder(config.text, text_path)
        self.extra: dict[str, Any] = {}
        self.vae_weights: Path | None = None

    def remember(self, history: torch.Tensor | None, lows: list[torch.Tensor | None]) -> MemoryTokens:
        """Encode a history with every encoder, one after another.

        Args:
            history: (B, C, T, H, W) scaled latents, or None if no encoder reads them.
            lows: for each encoder the scaled latents of the low-resolution video, or None.

        Returns:
            MemoryTokens of all encoders: tokens (B, M, D), positions (B or 1, M, 3).

        Raises:
            ValueError: there are not as many lows as encoders.
        """
        if len(lows) != len(self.encoders):
            raise ValueError(f"remember: lows must be as many as encoders ({len(self.encoders)}), got {len(lows)}")
        made = [encoder(history, low, self.dit.patch_embed) for encoder, low in zip(self.encoders, lows, strict=True)]
        batch = max(len(part.positions) for part in made)
        positions = [part.positions.expand(batch, -1, -1) for part in made]
        return MemoryTokens(torch.cat([part.tokens for part in made], 1), torch.cat(positions, 1))

    def predict(self, x: torch.Tensor, t: torch.Tensor, prompts: list[str], **given: Any) -> torch.Tensor:
        """Predict the velocity of noisy latents: DiT.forward with prompts in place of text tokens.

        Args:
            x: (B, C, K, H, W) noisy latents.
            t: (B,) or (B, K) times.
            prompts: B texts.
            given: frames, memory, window, window_frames, cache; see DiT.forward.

        Returns:
            (B, C, K, H, W).
        """
        return self.dit(x, t, *self.text(prompts), **given)

    @torch.no_grad()
    def retrieve(
        self,
        memory: MemoryTokens | None,
        frames: torch.Tensor,
        prompts: list[str],
        steps: int,
        generator: torch.Generator | None = None,
        *,
        window: torch.Tensor | None = None,
        window_frames: torch.Tensor | None = None,
        shift: float | None = None,
        size: tuple[int, int] | None = None,
        approximate: bool = False,
    ) -> torch.Tensor:
        """Make latent frames from noise, Euler steps along the predicted velocity.

        Args:
            memory: what `remember` gave, or None.
            frames: (B, K) positions in time, in latent frames.
            prompts: B texts.
            steps: number of steps.
            generator: of the noise, on its own device.
            window, window_frames: (B, C, W, H, W') clean latents and (B, W) their positions in time.
            shift: of the steps' times towards the noise; by default the configuration's.
            size: latent rows and columns; by default those of the configuration's frames.
            approximate: keep the history's keys and values of the first step also where they would
                change (`history_sees_video`): faster, some quality lost. Where they do not change they
                are always kept.

        Returns:
            float32 (B, C, K, H, W) scaled latents.

        Raises:
            ValueError: sizes that do not fit.
        """
        height, width = size or self.latent_size()
        b, k = frames.shape
        device = self.dit.head_table.device
        noise = torch.randn(
            (b, self.config.vae.channels, k, height, width),
            generator=generator,
            device=generator.device if generator is not None else device,
        ).to(device)
        text = self.text(prompts)
        cache = KVCache() if approximate or not self.config.dit.history_sees_video else None
        given = {
            "frames": frames.to(device),
            "memory": memory,
            "window": window,
            "window_frames": window_frames,
            "cache": cache,
        }
        return sample(lambda x, t: self.dit(x, t, *text, **given), noise, steps, shift or self.config.shift)

    def latent_size(self) -> tuple[int, int]:
        """Latent rows and columns of the configuration's frames, padded up to whole patches."""
        patch = self.config.dit.patch
        cells = [s * patch for s in self.config.vae.stride[1:]]
        rows, columns = (
            -(-n // c) * patch for n, c in zip((self.config.height, self.config.width), cells, strict=True)
        )
        return rows, columns


def model_path(path: str | Path) -> Path:
    """File of a model: the path itself, or model.safetensors in a folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / MODEL_FILE


def files_of(path: str | Path) -> list[Path]:
    """Files that a model is read from: its own, the one that its adapters are added to, and the VAE beside them."""
    file: Path | None = model_path(path)
    found: list[Path] = []
    while file is not None and file not in found:  # adapters that name each other are refused by load_model
        found.append(file)
        file = base_of(file)
    return [*found, found[-1].parent / VAE_FILE]


def save_model(
    path: str | Path, model: MemoryModel, extra: dict[str, Any] | None = None, *, dtype: str = "float32"
) -> Path:
    """Write a model and its configuration to a safetensors file, whole or not at all.

    Args:
        path: a file *.safetensors, or a folder, made if it is missing, for model.safetensors in it.
        model: what to write; a pretrained text encoder is left out.
        extra: anything JSON can hold, to be kept in the header.
        dtype: how the weights are stored, see `weights.pack`.

    Returns:
        The file.

    Raises:
        UserError: the file cannot be written.
        ValueError: the model has adapters (merge_lora first), or the weights cannot be stored so.
    """
    file = model_path(path)
    tensors = {k: v.detach().cpu() for k, v in model.state_dict().items() if not k.startswith(_PRETRAINED)}
    adapters = [name for name in tensors if ".lora_" in name]
    if adapters:
        raise ValueError(f"save_model: the model must have no adapters, merge_lora puts them in, got {adapters[0]}")
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(model.config.to_dict()),
        "extra": json.dumps(extra or {}),
    }
    write_tensors(file, pack(tensors, dtype), header)
    return file


def load_model(path: str | Path, text_path: str | Path | None = None) -> MemoryModel:
    """Read a model that save_model wrote, in float32, in evaluation mode.

    Args:
        path: the file, or the folder it is in; or a file of adapters that names the model beside it
            which they are to be added to (lora.attach_lora).
        text_path: folder of the pretrained text encoder, if the model reads prompts with one.

    Returns:
        The model; its attribute `extra` is what save_model was given, `vae_weights` the file
        vae.safetensors in the same folder, if there is one.

    Raises:
        UserError: the file, or the text encoder, is missing.
        MemoryFormatError: the file is damaged, not a model, or of another version.
    """
    file = model_path(path)
    base = base_of(file)
    if base is not None:
        model = load_model(base, text_path)
        model.extra = apply_lora(file, model)
        return model
    tensors, header = read_tensors(file, FORMAT, VERSION)
    try:
        config = ModelConfig.from_dict(json.loads(header["config"]))
        extra = json.loads(header["extra"])
    except (KeyError, TypeError, ValueError) as error:
        raise MemoryFormatError(f"{file}: its header is damaged ({error})") from error
    model = MemoryModel(config, text_path)
    try:
        missing, unknown = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise MemoryFormatError(f"{file}: its weights do not fit its configuration ({error})") from error
    missing = [name for name in missing if not name.startswith(_PRETRAINED)]
    if missing or unknown:
        names = ", ".join([*(f"no {n}" for n in missing[:3]), *(f"unknown {n}" for n in unknown[:3])])
        raise MemoryFormatError(f"{file}: its weights do not fit its configuration ({names})")
    vae = file.parent / VAE_FILE
    model.extra, model.vae_weights = extra, vae if vae.is_file() else None
    return model.eval()
