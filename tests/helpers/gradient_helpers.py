"""Comparison of a module with what it should be, gradients too."""

from __future__ import annotations

import torch


def same_gradients(module, got, expected, *inputs):
    """Of all parameters and inputs; asserts that both results are the same first."""
    torch.testing.assert_close(got, expected)
    leaves = [*module.parameters(), *inputs]
    weight = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
