"""Token merging beside memory in tiny diffusers models: put on in either order, taken off in any."""

import pytest
import torch
from diffusers_checks import out_of, skeleton
from diffusers_helpers import HEAD_SIZE, HEADS, MODELS, draw_grid, inputs_of
from torch import nn

from vidmem_kernels.diffusers import MemoryPrefix, add_memory_attention, apply_token_merging

every_layout = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
WIDTH = HEADS * HEAD_SIZE


def reading(model, memory):
    torch.manual_seed(3)
    m = add_memory_attention(model)
    for parameter in m.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return m.set(memory)


@every_layout
def test_memory_attention_and_merging_in_either_order(make):
    model = make()
    inputs, memory = inputs_of(model, draw_grid(1), batch=2), torch.randn(1, 7, WIDTH)
    before, is_as = out_of(model, inputs), skeleton(model)
    with apply_token_merging(model, kv_ratio=0.5):
        merged = out_of(model, inputs)
        m = reading(model, memory)
        both = out_of(model, inputs)
        m.remove()
        assert torch.equal(out_of(model, inputs), merged)
    m = reading(model, memory)
    read = out_of(model, inputs)
    h = apply_token_merging(model, kv_ratio=0.5)
    torch.testing.assert_close(out_of(model, inputs), both, rtol=1e-6, atol=1e-6)
    h.enabled = False
    assert torch.equal(out_of(model, inputs), read)
    h.enabled = True
    m.remove()  # from under the merging
    assert torch.equal(out_of(model, inputs), merged)
    h.remove()
    assert torch.equal(out_of(model, inputs), before) and skeleton(model) == is_as
    assert not torch.allclose(both, merged, atol=1e-3) and not torch.allclose(both, read, atol=1e-4)


@every_layout
def test_memory_prefix_and_merging_in_either_order(make):
    model = make()
    inputs, memory = inputs_of(model, draw_grid(2), batch=2), (torch.randn(1, 6, WIDTH), torch.randn(6, 3) * 4)
    before, is_as = out_of(model, inputs), skeleton(model)
    with apply_token_merging(model, kv_ratio=0.5), MemoryPrefix(model).set(*memory):
        both = out_of(model, inputs)
    with MemoryPrefix(model).set(*memory):
        longer = out_of(model, inputs)
        with apply_token_merging(model, kv_ratio=0.5):
            assert torch.equal(out_of(model, inputs), both)
        assert torch.equal(out_of(model, inputs), longer)
    assert torch.equal(out_of(model, inputs), before) and skeleton(model) == is_as
    assert not torch.allclose(both, longer, atol=1e-4)
