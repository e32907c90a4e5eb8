"""The optimizer Muon: momentum updates that are orthogonalised.

Source: Jordan et al., Muon (2024), with the scale of arXiv 2502.16982. Unlike torch.optim.Muon, the parts of a fused
projection are orthogonalised separately, equal shapes are processed in one batch, and sharded weights (FSDP2) are
supported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from .distributed import sharded_as

# Coefficients of the iteration x -> a x + b (x x^T) x + c (x x^T)^2 x, which moves singular values to about 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
# Root mean square of an update at a learning rate of 1, about that of AdamW.
_UPDATE = 0.2


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Move the singular values of matrices (N, R, C) close to 1, to between 0.6 and 1.3.

    Args:
        x: float matrices; zero matrices stay zero.

    Returns:
        Matrices of the shape of x.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


class Muon(torch.optim.Optimizer):
    """Muon for matrices. A matrix whose rows are a multiple of its columns is treated as several square matrices.

    Args:
        params: Weights (R, C).
        lr: Learning rate; the root mean square of an update is 0.2 times this.
        weight_decay: Weight decay, as in AdamW.
        momentum: Momentum (Nesterov).
        dtype: Dtype of the orthogonalisation.

    Raises:
        ValueError: A weight is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon: params must be matrices, got {tuple(p.shape)}")
                self.state[p]["momentum"] = torch.zeros_like(p, requires_grad=False)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])  # Nesterov
                whole = update.full_tensor() if hasattr(update, "full_tensor") else update
                rows, columns = p.shape
                square = rows > columns and rows % columns == 0
                whole = whole.to(self.dtype).view(-1, columns if square else rows, columns)
                alike[whole.shape[1:]].append((p, whole))
            for shape, pairs in alike.items():
                parts = orthogonalise(torch.cat([whole for _, whole in pairs]))
                counts = [len(whole) for _, whole in pairs]
                for (p, _), part in zip(pairs, parts.split(counts), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    step = sharded_as(part.reshape(p.shape).to(p.dtype), p)
                    p.add_(step, alpha=-_UPDATE * group["lr"] * max(shape) ** 0.5)
