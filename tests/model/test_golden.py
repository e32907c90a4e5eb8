"""Files of an earlier commit (golden/README.md) load with the same values, and runs resume from them."""

from __future__ import annotations

import json
from pathlib import Path

import golden_helpers as golden
import pytest
import torch
from golden_helpers import BANKS, GOLDEN, MEMORIES, MODELS, RECIPES, RUNS
from safetensors.torch import load_file

from vidmem_kernels import MemoryBank
from vidmem_model.checks import renewed
from vidmem_model.cli import main
from vidmem_model.memory import learned
from vidmem_model.model.config import ModelConfig

EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
COMMANDS = {"vae": "pretrain-vae", "one": "pretrain", "two": "finetune"}


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture
def golden_models(monkeypatch):
    golden.use_golden_models(monkeypatch)
    yield
    learned.open_model.cache_clear()


def of(tensors, name):
    """The tensors recorded for one file."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def holds(found, recorded, where=""):
    """What was recorded is found; keys that are newer may stand beside it."""
    if isinstance(recorded, dict):
        assert isinstance(found, dict) and recorded.keys() <= found.keys(), where
        for key, value in recorded.items():
            holds(found[key], value, f"{where}.{key}")
    elif isinstance(recorded, list) and recorded and isinstance(recorded[0], dict):
        assert len(found) == len(recorded), where
        for i, pair in enumerate(zip(found, recorded, strict=True)):
            holds(*pair, f"{where}[{i}]")
    else:
        assert found == recorded, where


def same(found, recorded):
    """Exactly these tensors, bit for bit."""
    assert found.keys() == recorded.keys()
    for name, tensor in found.items():
        assert tensor.dtype == recorded[name].dtype and torch.equal(tensor, recorded[name]), name


def close(found, recorded, share):
    """These tensors, within `share` of the largest number of each: elsewhere sums are taken in another order.

    Between baseline, AVX2 and AVX-512 kernels, the references, torch's and oneDNN's other instruction sets, MKL's
    most compatible mode, and torch 2.11 and 2.13: 7e-7 of a model's output, 6e-6 of a curve, 1.2e-5 of trained weights.
    """
    assert found.keys() == recorded.keys()
    for name, tensor in found.items():
        assert tensor.dtype == recorded[name].dtype, name
        atol = share * recorded[name].abs().max().item()
        torch.testing.assert_close(tensor, recorded[name], rtol=share, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("storage", ["device", "mmap"])
@pytest.mark.parametrize("dtype", BANKS)
def test_bank(tensors, dtype, storage):
    bank = MemoryBank.load(GOLDEN / "banks" / f"{dtype}.safetensors", storage=storage)
    assert (len(bank), bank.channels, bank.dtype) == (24, 20, getattr(torch, dtype))
    assert bank.metadata == EXPECTED[f"banks/{dtype}"]
    recorded = of(tensors, f"banks/{dtype}")
    exact, sums = golden.of_bank(bank)
    close(sums, {name: recorded.pop(name) for name in sums}, 1e-6)
    same(exact, recorded)


@pytest.mark.parametrize("dtype", BANKS)
def test_bank_is_appended_to_and_saved_again(tensors, dtype, tmp_path):
    """Old rows and new ones, which are stored as the old ones were."""
    recorded = tensors[f"banks/{dtype}.rows"]
    bank = MemoryBank.load(GOLDEN / "banks" / f"{dtype}.safetensors")
    bank.append(recorded[:2], torch.zeros(2, 3))
    bank.save(tmp_path / "more.safetensors")
    again = MemoryBank.load(tmp_path / "more.safetensors")
    rows = again.gather(torch.arange(26), out_dtype=torch.float32)
    assert torch.equal(rows[:24], recorded)
    # Quantised anew, a row's scale may round the other way.
    torch.testing.assert_close(rows[24:], recorded[:2], rtol=1e-6, atol=0)
    assert again.metadata == EXPECTED[f"banks/{dtype}"]


@pytest.mark.parametrize("name", MEMORIES)
def test_memory(tensors, name, golden_models):
    found, frame = golden.of_memory(GOLDEN / "memories" / f"{name}.safetensors")
    assert found == EXPECTED[f"memories/{name}"]
    difference = (frame.int() - tensors[f"memories/{name}.frame"].int()).abs()
    # A level where the sum lay between two.
    assert difference.max() <= 1 and difference.count_nonzero() <= 6, difference.count_nonzero()


@pytest.mark.parametrize("name", MODELS)
def test_model(tensors, name):
    found, made, weights = golden.of_model(GOLDEN / "models" / f"{name}.safetensors")
    recorded = dict(EXPECTED[f"models/{name}"])
    stored = recorded.pop("weights")
    recorded["config"] = renewed(ModelConfig, recorded["config"])
    assert name == "tiny_continue" or weights == stored  # the adapters are a product, and added
    holds(found, recorded)
    close(made, of(tensors, f"models/{name}"), 1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, monkeypatch):
    monkeypatch.chdir(GOLDEN / "recipes")
    config = RECIPES[name](Path(f"{name}.yaml"))
    holds(golden.plain(config), renewed(type(config), EXPECTED[f"recipes/{name}"]))


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A copy of the stopped runs, and the working folder their recipes are for."""
    folder = golden.copy_of_training(tmp_path)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_checkpoint(name, stopped):
    stored = golden.of_checkpoint(stopped / name / "checkpoints" / "step-00000003")
    assert stored == EXPECTED[f"training/{name}"]["checkpoint"]


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on(name, stopped):
    """To the curve and the weights that it came to when it was written."""
    pytest.importorskip("av", reason="the film is decoded by PyAV")
    if name == "two":
        pytest.importorskip("peft", reason="Stage II trains the adapters of peft")
    recorded = EXPECTED[f"training/{name}"]["curve"]
    assert golden.curve(stopped / name) == recorded[:3]
    assert main([COMMANDS[name], f"{name}.yaml"]) == 0
    curve = golden.curve(stopped / name)
    assert len(curve) == len(recorded) and curve[:3] == recorded[:3]
    for row, other in zip(curve, recorded, strict=True):
        assert row == pytest.approx(other, rel=5e-5), row[0]
    weights = load_file(stopped / name / RUNS[name])
    close(weights, load_file(GOLDEN / "training" / "finished" / f"{name}.safetensors"), 1e-4)
