"""LoRA: identity at initialisation, training of adapters only, exact merging, adapter files."""

import builtins
import dataclasses

import pytest
import torch
from torch import nn

from vidmem_model.errors import MemoryFormatError, UserError
from vidmem_model.model.config import PRESETS
from vidmem_model.model.dit import DiT
from vidmem_model.model.lora import add_lora, apply_lora, lora_state, merge_lora, save_lora

pytest.importorskip("peft")
CONFIG = dataclasses.replace(PRESETS["tiny"].dit, memory_cross_attention=True)


def made(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    dit = DiT(config, 4, 6)
    with torch.no_grad():  # away from the zeros of a fresh model
        for parameter in dit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return dit


def run(dit):
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(1, 4, 1, 2, 4, generator=generator), torch.randn(1, 2, 6, generator=generator)
    return dit(x, torch.tensor([0.5]), text, torch.ones(1, 2, dtype=torch.bool), frames=torch.zeros(1, 1))


def trained(dit, steps=3):
    parameters = [p for p in dit.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        run(dit).square().mean().backward()
        optimizer.step()
    return dit


def test_identity_at_first_and_on_every_linear_layer():
    dit = made()
    linear = [name for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)]
    before = run(dit)
    assert add_lora(dit, rank=2) == linear
    assert "blocks.1.memory_attention.k" in linear and "head" in linear and "patch_projection" in linear
    assert torch.equal(run(dit), before)
    shapes = {name: tuple(tensor.shape) for name, tensor in lora_state(dit).items()}
    assert shapes["blocks.0.qkv.lora_A.default.weight"] == (2, 48)
    assert shapes["blocks.0.qkv.lora_B.default.weight"] == (144, 2)
    assert len(shapes) == 2 * len(linear)


def test_only_adapters_train_and_merging_keeps_what_they_learned():
    dit = made()
    base = {name: p.clone() for name, p in dit.named_parameters()}
    start = run(dit)
    add_lora(dit, rank=2, alpha=4)
    trained(dit)
    now = {name.replace("base_layer.", ""): p for name, p in dit.named_parameters()}
    assert all(torch.equal(now[name], p) for name, p in base.items())
    learned = run(dit)
    assert learned.square().mean() < 0.9 * start.square().mean()

    a, b = (dit.blocks[0].up.get_parameter(f"lora_{x}.default.weight").clone() for x in "AB")
    merge_lora(dit)
    torch.testing.assert_close(run(dit), learned)
    assert [n for n, _ in dit.named_parameters()] == list(base)
    torch.testing.assert_close(dit.blocks[0].up.weight, base["blocks.0.up.weight"] + 4 / 2 * b @ a)


@pytest.mark.filterwarnings("error")
def test_fresh_adapters_after_merging():
    dit = made()
    add_lora(dit, rank=2)
    merge_lora(trained(dit))
    before = run(dit)
    add_lora(dit, rank=3)
    assert torch.equal(run(dit), before)
    assert lora_state(dit)["head.lora_A.default.weight"].shape == (3, 48)


def test_saved_alone(tmp_path):
    dit = made()
    add_lora(dit, rank=2, alpha=3)
    trained(dit)
    file = tmp_path / "adapters.safetensors"
    save_lora(file, dit, {"steps": 3})
    again = made()
    assert apply_lora(file, again) == {"steps": 3}
    torch.testing.assert_close(run(again), run(dit))

    other = made(config=dataclasses.replace(CONFIG, depth=1))
    before = run(other)
    with pytest.raises(MemoryFormatError, match="for a model of other sizes"):
        apply_lora(file, other)
    assert torch.equal(run(other), before)
    with pytest.raises(UserError, match="no such file"):
        apply_lora(tmp_path / "none.safetensors", made())


def test_misuse_is_told(monkeypatch):
    dit = made()
    with pytest.raises(ValueError, match="must have adapters"):
        merge_lora(dit)
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        add_lora(dit, rank=0)
    add_lora(dit, rank=1)
    with pytest.raises(ValueError, match="must have no adapters"):
        add_lora(dit, rank=1)
    real = builtins.__import__

    def without(name, *rest):
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install peft"):
        add_lora(made(), rank=1)
