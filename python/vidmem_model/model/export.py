"""Export a trained model and its VAE to small files."""

from __future__ import annotations

from pathlib import Path

from ..vae import load_vae
from ..weights import pack, write_tensors
from .file import VAE_FILE, load_model, save_model
from .lora import LORA_FILE, attach_lora, check_base


def store(run: str | Path, output: Path, dtype: str, base: str | None = None) -> list[Path]:
    """Export a trained model and the VAE beside it.

    Args:
        run: Model file or folder.
        output: Model file to write; the VAE is written beside it as vae.safetensors.
        dtype: Storage format of the weights, see `weights.pack`.
        base: File name of an exported Stage I model in the folder of `output`. Then only the LoRA adapters of
            Stage II are stored; its run must have had `freeze_encoder`.

    Returns:
        The written files.

    Raises:
        UserError: A file is missing, damaged, or cannot be written.
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
