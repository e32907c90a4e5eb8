"""A trained model, stored to be shipped."""

from __future__ import annotations

from pathlib import Path

from ..vae import load_vae
from ..weights import pack, write_tensors
from .file import VAE_FILE, load_model, save_model
from .lora import LORA_FILE, attach_lora, check_base


def store(run: str | Path, output: Path, dtype: str, base: str | None = None) -> list[Path]:
    """Store a trained model and the VAE beside it.

    Args:
        run: the model's file or folder.
        output: the model's new file; the VAE becomes vae.safetensors in its folder.
        dtype: see `weights.pack`.
        base: name of the stored model of Stage I in the folder of `output`; only what Stage II has added
            to that is stored then, its adapters. The run must have left the encoders frozen.

    Returns:
        The files.

    Raises:
        UserError: a file is missing, damaged, or cannot be written.
    """
    if base is not None:
        load_model(output.parent / check_base(base, output))
        attach_lora(Path(run) / LORA_FILE, output, base, dtype)
        return [output]
    model = load_model(run)
    files = [save_model(output, model, model.extra, dtype=dtype)]
    if model.vae_weights is not None:
        vae = load_vae(model.config.vae, model.vae_weights)
        files.append(files[0].with_name(VAE_FILE))
        write_tensors(files[1], pack(vae.state_dict(), dtype), {})
    return files
