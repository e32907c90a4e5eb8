"""Video codecs and VAEs behind one interface, and the 2x2 patchify."""

from .base import VideoCodec, frames_to_float, frames_to_uint8, pad_frames, rechunk
from .dct import DCTCodec, dct_matrix
from .patchify import PATCH, patchify, unpatchify

__all__ = [
    "PATCH",
    "DCTCodec",
    "VideoCodec",
    "dct_matrix",
    "frames_to_float",
    "frames_to_uint8",
    "pad_frames",
    "patchify",
    "rechunk",
    "unpatchify",
]
