"""A model's file whose header and tensors do not fit each other is refused before a model is made of it."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from header_helpers import one_number, tensor, text
from hostile import GOLDEN, Tensors

from vidmem_model.errors import UserError
from vidmem_model.measure.peak import PeakMemory
from vidmem_model.memory.learned import TrainedModel
from vidmem_model.model.config import DiTConfig, ModelConfig, TextConfig
from vidmem_model.model.file import load_model
from vidmem_model.skeleton import count_numbers, require_trainable, skeleton


def config(place, value):
    """Change a value of the configuration, by its place."""

    def change(file):
        tree = json.loads(file.texts["config"])
        *way, last = place.split(".")
        inside = tree
        for step in way:
            inside = inside[int(step) if step.isdigit() else step]
        inside[last] = value
        file.texts["config"] = json.dumps(tree)

    return change


def dropped(name):
    def change(file):
        del file.tensors[name]

    return change


def renamed(name, new):
    def change(file):
        file.tensors[new] = file.tensors.pop(name)

    return change


def added(name, like):
    def change(file):
        file.tensors[name] = file.tensors[like]

    return change


WEIGHT = "dit.blocks.0.qkv.weight"  # int8, with a scale a row
NORM = "dit.head_table"
CASES = {
    "a depth without end": (config("dit.depth", 10_000_000), "dit.depth: DiTConfig: depth must be at most 10,000"),
    "a depth beyond its weights": (config("dit.depth", 10_000), "10,000 blocks"),
    "one block more": (config("dit.depth", 3), "no dit.blocks.2."),
    "wider": (config("dit.mlp", 65_536), "of shape"),
    "no height": (config("height", 0), "height must be positive, got 0"),
    "height below 0": (config("height", -32), "height must be positive, got -32"),
    "fps nan": (config("fps", math.nan), "fps must be positive, got nan"),
    "fps inf": (config("fps", math.inf), "fps must be positive, got inf"),
    "no encoders": (config("encoders", []), "encoders must not be empty"),
    "many encoders": (config("encoders", [{}] * 3000), "encoders must have at most 16 entries"),
    "a box without end": (config("encoders.0.rate", [2**40, 2, 2]), "rate: must have 3 entries"),
    "both names": (config("encoders.0.compression", {"time": 2}), "rate: is the former name of compression"),
    "true channels": (config("vae.channels", True), "vae.channels: must be of type int, got True"),
    "long numbers": (text("config", '{"height": ' + "9" * 5000 + "}"), "config holds Exceeds the limit"),
    "deep": (text("config", "[" * 100_000), "config is nested too deeply"),
    "no configuration": (text("config", "null"), "config must be a mapping of keys to values, got None"),
    "a key twice": (text("config", '{"height": 32, "height": 64}'), "config has the key 'height' twice"),
    "a width of many tokens": (config("text.vocabulary", 1 << 24), "text.words.weight of shape"),
    "unfolds nothing": (config("dit.unfold", 1), "unfold must be at least the 32 numbers of a patch token"),
    "extra is a list": (text("extra", "[]"), "extra must be a mapping"),
    "training is a list": (text("extra", {"training": []}), "training must be a mapping"),
    "sampling without end": (text("extra", {"training": {"sampling": {"queries": 10**9}}}), "queries must be at most"),
    "no queries": (text("extra", {"training": {"sampling": {"queries": 0}}}), "queries must be positive"),
    "data of another kind": (
        text("extra", {"training": {"data": {"test": [[1]]}}}),
        "data.test[0]: must have 2 entries",
    ),
    "int weights": (tensor(NORM, "I32", 1), "has dtype 'I32', weights have"),
    "int8 without its scale": (dropped(f"{WEIGHT}.row_scale"), "lacks one float32 scale per row"),
    "int8 where floats are": (tensor(NORM, "I8", 1), "lacks one float32 scale per row"),
    "a scale of another shape": (tensor(f"{WEIGHT}.row_scale", "F32", 1.0, [48, 1]), "lacks one float32 scale per row"),
    "a scale of float16": (tensor(f"{WEIGHT}.row_scale", "F16", 1.0), "lacks one float32 scale per row"),
    "a scale of nothing": (renamed(NORM, f"{NORM}.row_scale"), "is a scale without its int8 weight"),
    "a scale nan": (one_number(f"{WEIGHT}.row_scale", "f", math.nan), "holds numbers that are not finite"),
    "a weight nan": (one_number(NORM, "f", math.nan), "holds numbers that are not finite"),
    "a weight inf": (one_number(NORM, "f", -math.inf), "holds numbers that are not finite"),
    "missing": (dropped(NORM), f"no {NORM}"),
    "unknown": (added("dit.more", NORM), "unknown dit.more"),
    "a long name": (added("x" * 10_000, NORM), "unknown xxx"),
    "another shape": (tensor(NORM, "F32", 1.0, [48, 2]), f"{NORM} of shape (48, 2), not (2, 48)"),
    "many dimensions": (tensor(NORM, "F32", 1.0, [1] * 100), f"{NORM} has shape [1, 1, 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(case, tmp_path):
    change, says = CASES[case]
    file = Tensors.read((GOLDEN / "models" / "tiny.safetensors").read_bytes())
    path = tmp_path / "m.safetensors"
    path.write_bytes(file.write())
    TrainedModel.load(path)  # put together again it is as it was
    change(file)
    path.write_bytes(file.write())
    with PeakMemory() as memory, pytest.raises(UserError) as caught:
        TrainedModel.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message, message
    assert message.isprintable() and len(message) < 500
    assert memory.grown_bytes < 64 << 20


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"base": "tiny_continue.safetensors"}, "names itself as its base model"),
        ({"base": "../tiny.safetensors"}, "base must be the name of a file in the same folder"),
        ({"base": "/etc/passwd"}, "base must be the name of a file in the same folder"),
        ({"base": ".."}, "base must be the name of a file in the same folder"),
        ({"base": "a\0b"}, "must not contain a NUL character"),
        ({"base": 3}, "base: must be of type str, got 3"),
        ({"base": "none.safetensors"}, "none.safetensors: no such file"),
        ({"rank": 0}, "rank must be positive, got 0"),
        ({"rank": math.inf}, "rank: must be of type int, got inf"),
        ({"rank": 3}, "its adapters are for a model of other sizes"),
        ({"alpha": math.nan}, "alpha must be positive, got nan"),
        ({"alpha": "1"}, "alpha: must be of type float, got '1'"),
    ],
)
def test_adapters_of_another_form(form, says, tmp_path):
    for name in ("tiny", "tiny_continue"):
        shutil.copyfile(GOLDEN / "models" / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    path = tmp_path / "tiny_continue.safetensors"
    load_model(path)
    file = Tensors.read(path.read_bytes())
    file.texts["lora"] = json.dumps(json.loads(file.texts["lora"]) | form)
    path.write_bytes(file.write())
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert says in str(caught.value) and len(str(caught.value)) < 400


def test_a_loop_of_two_files(tmp_path):
    file = Tensors.read((GOLDEN / "models" / "tiny_continue.safetensors").read_bytes())
    for name, base in ("ab", "ba"):
        file.texts["lora"] = json.dumps(json.loads(file.texts["lora"]) | {"base": f"{base}.safetensors"})
        (tmp_path / f"{name}.safetensors").write_bytes(file.write())
    with pytest.raises(UserError, match=r"a.safetensors: names itself as its base model"):
        load_model(tmp_path / "a.safetensors")


def test_weights_are_counted_without_being_made():
    from vidmem_model.model.memory_model import MemoryModel

    config = ModelConfig(dit=DiTConfig(dim=24, depth=5, heads=2, mlp=8, linear_blocks=(1, 3)), text=TextConfig(dim=8))
    made = sum(t.numel() for t in MemoryModel(config).state_dict().values())
    assert count_numbers(lambda depth: MemoryModel(config.with_depth(depth)), 5) == made
    assert all(t.is_meta for t in skeleton(lambda: MemoryModel(config)).state_dict().values())
    huge = ModelConfig(dit=DiTConfig(dim=131_072, depth=10_000, heads=1024, mlp=131_072))
    with PeakMemory() as memory, pytest.raises(UserError, match=r"a model of [\d,]{15,} weights takes about .* GiB of"):
        require_trainable(lambda depth: MemoryModel(huge.with_depth(depth)), 10_000, torch.device("cpu"))
    assert memory.grown_bytes < 64 << 20
