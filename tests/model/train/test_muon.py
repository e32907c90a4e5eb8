"""Muon: torch's own steps, fused projections part by part, orthogonal updates."""

from __future__ import annotations

import pytest
import torch

from vidmem_model.train.muon import Muon, orthogonalise


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(optimizer, parameters, steps=4):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_steps_are_those_of_torch():
    """Shapes that are not cut: squares, wide ones, and a tall one that does not consist of squares."""
    shapes = (16, 16), (8, 24), (16, 16), (20, 12)
    ours, theirs = weights(*shapes), weights(*shapes)
    made = take_steps(Muon(ours, lr=0.1, weight_decay=0.02), ours)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for mine, other, start in zip(made, take_steps(reference, theirs), weights(*shapes), strict=True):
        moved = (other - start).square().mean().sqrt()
        assert (mine - other).square().mean().sqrt() < 0.02 * moved  # both in bfloat16


def test_parts_of_a_fused_projection_are_apart():
    (fused,), parts = weights((36, 12)), weights((36, 12))[0].detach().chunk(3)
    parts = [torch.nn.Parameter(part.clone()) for part in parts]
    whole, separate = Muon([fused], lr=0.1, dtype=torch.float32), Muon(parts, lr=0.1, dtype=torch.float32)
    fused.grad = torch.randn(36, 12, generator=torch.Generator().manual_seed(1))
    for part, grad in zip(parts, fused.grad.chunk(3), strict=True):
        part.grad = grad.clone()
    whole.step()
    separate.step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 8, 40), (2, 40, 8)])
def test_orthogonal_updates(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    made = orthogonalise(x)
    # Directions stay; singular values, but for the smallest ones, come near 1.
    values = torch.diagonal(left.mT @ made @ right.mT, dim1=1, dim2=2)
    torch.testing.assert_close(left @ torch.diag_embed(values) @ right, made)
    assert values.max() < 1.3 and values[:, : shape[1] // 2].min() > 0.6


def test_size_of_an_update():
    (wide,) = weights((8, 24))
    before = wide.detach().clone()
    take_steps(Muon([wide], lr=0.1, weight_decay=0.0), [wide], steps=1)
    # Eight singular values of about 1 over 8 x 24 numbers, times 0.2 * sqrt(24).
    moved = (wide.detach() - before).square().mean().sqrt()
    assert float(moved) == pytest.approx(0.1 * 0.2, rel=0.25)


def test_weights_without_gradient_stay_and_zeros_do_no_harm():
    still, zero = weights((4, 4), (4, 4))
    before = still.detach().clone()
    zero.grad = torch.zeros(4, 4)
    Muon([still, zero], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(still, before) and torch.equal(zero, weights((4, 4), (4, 4))[1])


def test_only_matrices():
    with pytest.raises(ValueError, match="must be matrices"):
        Muon(weights((3, 2, 2)), lr=0.1)
