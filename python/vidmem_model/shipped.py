"""Paths of the shipped checkpoints; pretrained/README.md says how they were trained."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).with_name("pretrained")
# Stage I reconstructs frames, Stage II continues a video.
DEFAULT_MODEL = "demo"
CONTINUING_MODEL = "demo_continue"


def shipped(name: str = DEFAULT_MODEL) -> Path | None:
    """Path of a shipped checkpoint, or None if it is not installed."""
    path = CHECKPOINTS / f"{name}.safetensors"
    return path if path.is_file() else None
