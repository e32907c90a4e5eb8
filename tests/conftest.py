"""Fixtures of all tests. TRITON_INTERPRET is set before Triton is imported, where there is no GPU."""

import importlib.util
import os
import random

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


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marker
def pytest_collection_modifyitems(items):
    """Of a test marked `sample(n)` all cases but n become `long`; the draw's seed is the test's name."""
    drawn = {}
    for item in items:
        if item.get_closest_marker("sample"):
            drawn.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, cases in drawn.items():
        runnable = [case for case in cases if torch.cuda.is_available() or not case.get_closest_marker("gpu")]
        count = cases[0].get_closest_marker("sample").args[0]
        sample = random.Random(name).sample(runnable, min(count, len(runnable)))
        for case in cases:
            if case not in sample:
                case.add_marker("long")
