"""Compares a module with its expected results, including gradients."""

from __future__ import annotations

import torch


def same_gradients(module, got, expected, *inputs):
    """Gradients of all parameters and inputs, after asserting that both results are equal."""
    torch.testing.assert_close(got, expected)
    leaves = [*module.parameters(), *inputs]
    weight = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
