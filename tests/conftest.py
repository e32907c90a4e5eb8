"""Fixtures of all tests. TRITON_INTERPRET is set before Triton is imported, where there is no GPU."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A GPU machine may lack PyAV and only run what needs a GPU; these decode video.
collect_ignore = [] if importlib.util.find_spec("av") else ["test_cli.py", "test_data.py", "test_report.py"]

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
