"""What the tests of adapters for diffusers' models ask of every one of them."""

import pytest
import torch
from diffusers_helpers import tiny_framepack, tiny_hunyuan, tiny_wan

FAMILIES = {"wan": tiny_wan, "hunyuan": tiny_hunyuan, "framepack": tiny_framepack}


def out_of(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def skeleton(model):
    """Everything that may be left behind: attributes, modules, hooks of every module."""
    kept = {}
    for name, module in model.named_modules():
        plain = {k: id(v) for k, v in vars(module).items() if not k.startswith("_") or k == "_diffusers_hook"}
        hooks = {k: len(v) for k, v in vars(module).items() if "_hooks" in k and isinstance(v, dict)}
        kept[name] = (type(module), plain, hooks, [*module._modules], [*module._parameters], [*module._buffers])
    return kept


def said(error, call, message):
    """Asserts that a call raises an error of one line that says so."""
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value) and "\n" not in str(raised.value), raised.value
