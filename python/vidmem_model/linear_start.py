"""A start for training: the best linear memory of the training data, found in closed form.

A memory encoder with a linear projection of the box and a DiT that reads the memory in place (unfold)
contain a linear autoencoder of boxes. Its optimum is the principal components of the data, so that there
is no need to descend to it: the demo model then has after 50 steps the loss of 1,200 steps from a random start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from .encoder import MemoryEncoder
from .model import MemoryModel
from .vae import patchify

History = tuple[torch.Tensor, Sequence[torch.Tensor | None]]
# Ridge of the regression, as a share of the mean square of the tokens.
_RIDGE = 1e-4


@torch.no_grad()
def start_linearly(model: MemoryModel, histories: Callable[[], Iterable[History]]) -> None:
    """Set the encoders' linear projections to principal components, and what is read in place to their inverse.

    The components are scaled half way to equal variance. What the convolutions add starts at 0. The
    reading is fitted by least squares to the tokens of the first encoder, whichever branches it has;
    where the DiT reads nothing in place, only the encoders change.

    Args:
        model: a fresh one.
        histories: makes an iterator over scaled latents (B, C, T, H, W) of whole boxes, each with the
            low-resolution latents for every encoder or None; the same in every call.

    Raises:
        ValueError: there are no histories.
    """
    for encoder in model.encoders:
        if encoder.patchifier is not None:
            _set_components(encoder, (history for history, _ in histories()))
    if model.dit.unfold is not None:
        _set_reading(model, histories())


def _set_components(encoder: MemoryEncoder, histories: Iterable[torch.Tensor]) -> None:
    boxes = (encoder.boxes(history).flatten(0, 1) for history in histories)
    gram, _ = _sums((rows, rows[:, :0]) for rows in boxes)
    count = gram[-1, -1]
    mean = gram[-1, :-1] / count
    variance, components = torch.linalg.eigh(gram[:-1, :-1] / count - torch.outer(mean, mean))
    kept = min(encoder.dim, len(variance))
    variance, components = variance.flip(0)[:kept], components.flip(1)[:, :kept]
    deviation = variance.clamp(min=1e-6 * variance[0]).sqrt()
    # Scores have the deviation sqrt(deviation), and a whole token the mean square 1.
    weight = (components * (encoder.dim / deviation.sum() / deviation).sqrt()).T
    layer = encoder.patchifier
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    layer.weight[:kept] = weight.to(layer.weight.dtype)
    layer.bias[:kept] = -(weight @ mean).to(layer.bias.dtype)
    if encoder.projection is not None:
        nn.init.zeros_(encoder.projection.weight)


def _set_reading(model: MemoryModel, histories: Iterable[History]) -> None:
    encoder, unfold = model.encoders[0], model.dit.unfold
    time, height, width = unfold.span

    def cells_of_boxes(history: torch.Tensor) -> torch.Tensor:
        cells, (frames, rows, columns) = patchify(history, model.config.dit.patch)
        cells = cells.view(len(cells), frames // time, time, rows // height, height, columns // width, width, -1)
        return cells.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(0, 3)

    gram, product = _sums(
        (encoder(history, lows[0], model.dit.patch_embed).tokens.flatten(0, 1), cells_of_boxes(history))
        for history, lows in histories
    )
    diagonal = gram.diagonal()[:-1]
    diagonal += _RIDGE * diagonal.mean()
    solution = torch.linalg.solve(gram, product).unflatten(1, (unfold.places, -1)).to(unfold.projection.weight.dtype)
    cell = solution.shape[2]
    unfold.projection.weight.unflatten(0, (unfold.places, -1))[:, :cell] = solution[:-1].permute(1, 2, 0)
    unfold.projection.bias.unflatten(0, (unfold.places, -1))[:, :cell] = solution[-1]


def _sums(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of x^T x and x^T y in float64, over pieces x (N, C) and y (N, E); x gets a last column of ones."""
    gram = product = None
    for x, y in pairs:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1).to(torch.float32)
        sums = (x.T @ x).to(torch.float64), (x.T @ y.to(torch.float32)).to(torch.float64)
        gram, product = sums if gram is None else (gram.add_(sums[0]), product.add_(sums[1]))
    if gram is None:
        raise ValueError("start_linearly: there must be histories, got none")
    return gram, product
