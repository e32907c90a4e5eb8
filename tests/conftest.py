"""Fixtures of all tests. TRITON_INTERPRET is set before Triton is imported, where there is no GPU."""

import os
import random
import re
import time

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a machine that only runs kernels may lack: all that is not torch, numpy or a test runner.
PACKAGES = {
    "av",
    "diffusers",
    "hypothesis",
    "matplotlib",
    "peft",
    "rich",
    "safetensors",
    "skimage",
    "transformers",
    "triton",
    "typer",
    "yaml",
}

from backend_helpers import CAPABILITIES, backend_called  # noqa: E402

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


@pytest.fixture
def machine(monkeypatch):
    """Pretends to a GPU and to packages of attention; see library_helpers.pretending."""
    from library_helpers import pretending

    with pretending(monkeypatch) as pretend:
        yield pretend


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device there is; the CUDA runs carry the marker `gpu`."""
    return request.param


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """Every instruction set that the CPU kernels are compiled for and this processor has, one after another."""
    with backend_called(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Starts commands as processes of their own, without the time of their imports."""
    from process_helpers import Nursery

    made = Nursery(tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def whole(nursery, tmp_path_factory):
    """Results and seconds of one of process_helpers.COMMANDS that nothing disturbs."""
    from process_helpers import COMMANDS, results, stage

    known = {}

    def run(name):
        if name not in known:
            folder = stage(tmp_path_factory.mktemp(name) / "whole")
            began = time.monotonic()
            done = nursery.run(folder, *COMMANDS[name])
            assert done.code == 0, done.err
            known[name] = results(folder), time.monotonic() - began
        return known[name]

    return run


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file that imports one of PACKAGES, itself or through what it tests, is skipped where that is not installed."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        missing = missing_packages(str(report.longrepr))
        if missing and set(missing) <= PACKAGES:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {', '.join(missing)} is not installed")
    return report


def missing_packages(error):
    """For want of which an import failed; vidmem_model names all that it lacks."""
    needs = re.findall(r"^E +ImportError: vidmem_model \S+ needs (.*); run: ", error, re.MULTILINE)
    if needs and " is installed)" not in needs[-1]:  # which is of the wrong version
        names = re.findall(r"([\w-]+)\S* \(not installed\)", needs[-1])
        return [{"pyyaml": "yaml"}.get(name, name) for name in names]
    return re.findall(r"^E +ModuleNotFoundError: No module named '(\w+)'?", error, re.MULTILINE)[-1:]


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
