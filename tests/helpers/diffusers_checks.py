"""Checks that the tests run for every adapter of diffusers' models."""

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers_helpers import tiny_framepack, tiny_hunyuan, tiny_wan

from vidmem_kernels.diffusers import family_of

FAMILIES = {"wan": tiny_wan, "hunyuan": tiny_hunyuan, "framepack": tiny_framepack}


def out_of(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def compiled(model, backend):
    """The model, compiled whole; of FramePack, whose forward asks tensors for sizes, its blocks."""
    torch._dynamo.reset()
    options = {"backend": backend, "fullgraph": True, "dynamic": True}
    if not isinstance(model, HunyuanVideoFramepackTransformer3DModel):
        return torch.compile(model, **options)
    for block in family_of(model).blocks(model):
        block.module.compile(**options)
    return model


def same_compiled(fast, model, inputs, backend):
    """Asserts that `fast`, from `compiled`, gives what the model gives op by op."""
    with torch.no_grad():
        got = fast(**inputs)[0]
        with torch.compiler.set_stance("force_eager"):
            expected = model(**inputs)[0]
    tolerance = 0.0 if backend == "aot_eager" else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


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
