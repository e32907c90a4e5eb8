"""The trained models that come with the package; how they were made stands in pretrained/README.md."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).with_name("pretrained")
# Stage I, which reads frames back, and Stage II, which continues video.
DEFAULT_MODEL = "demo"
CONTINUING_MODEL = "demo_continue"


def shipped(name: str = DEFAULT_MODEL) -> Path | None:
    """Path of a checkpoint that comes with the package, or None if it is not there."""
    path = CHECKPOINTS / f"{name}.safetensors"
    return path if path.is_file() else None
