"""Fixtures of all tests. TRITON_INTERPRET is set before Triton is imported, where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device there is; the CUDA runs carry the marker `gpu`."""
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
