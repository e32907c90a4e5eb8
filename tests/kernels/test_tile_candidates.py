"""Whatever tile a kernel of token merging and sparse gathering is tuned to, it gives what its default does."""

import random

import pytest
import torch
from torch.utils import _pytree as pytree

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, _tuned
from vidmem_kernels._op import OPS

pytest.importorskip("triton")


def plan(x):
    return vk.match_tokens(x[..., :8].float(), x.shape[1] // 2 - 1)


def long_group(x):
    """A plan whose first row has most of the tokens."""
    tokens = x.shape[1]
    row = (torch.arange(tokens, device=x.device) >= tokens - 9) * (torch.arange(tokens, device=x.device) - tokens + 10)
    order = torch.arange(tokens, dtype=torch.int32, device=x.device)
    offsets = torch.searchsorted(row, torch.arange(11, device=x.device)).int()
    kept = offsets[:-1].clone()
    return vk.MergePlan(*(t.int().repeat(x.shape[0], 1) for t in (row, kept, order, offsets)))


def rows(x, dtype):
    values = vk.quantize_rows(x, dtype)
    return vk.gather_tokens(values.rows, index(x), scale=values.scale, out_dtype=torch.bfloat16, backend="triton")


def index(x):
    return torch.arange(x.shape[1] + 3, device=x.device).flip(0).expand(x.shape[0], -1) % (x.shape[1] + 1) - 1


def heads(x):
    return x.unsqueeze(2)


CALLS = {
    "gather": lambda x: vk.gather_tokens(x, index(x), backend="triton"),
    "gather int8": lambda x: rows(x, torch.int8),
    "gather float8": lambda x: rows(x, torch.float8_e4m3fn),
    "scatter": lambda x: vk.scatter_add_tokens(
        x.repeat(1, 4, 1), index(x.repeat(1, 4, 1))[:, :-3] % 7, 7, backend="triton"
    ),
    "quantize": lambda x: vk.quantize_rows(x, torch.int8, backend="triton"),
    "select": lambda x: vk.select_tokens(x, 40, backend="triton"),
    "topk": lambda x: vk.topk_blocks(heads(x), heads(x), block_size=(9, 2), topk=7, backend="triton"),
    "nearest": lambda x: vk.topk_blocks(heads(x), heads(x), block_size=(1, 1), topk=1, backend="triton"),
    "match": lambda x: vk.match_tokens(x, 50, backend="triton"),
    "match window": lambda x: vk.match_tokens(x, 50, grid=(5, 5, 6), window=(1, 1, 1), backend="triton"),
    "match neighbors": lambda x: vk.match_neighbors(x, 50, grid=(5, 5, 6), backend="triton"),
    "merge": lambda x: vk.merge_tokens(x, plan(x), backend="triton"),
    "merge many": lambda x: vk.merge_tokens(
        x, long_group(x), torch.rand(x.shape[:2], device=x.device), backend="triton"
    ),
    "unmerge": lambda x: vk.unmerge_tokens(x[:, : plan(x).kept.shape[1]], plan(x), backend="triton"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", CALLS)
def test_candidates_change_nothing(name, device):
    """Two candidates of each kernel of the call, drawn; the results are equal to the bit."""
    reason = _dispatch.unavailable(OPS["match_tokens"], "triton", device)
    if reason is not None:
        pytest.skip(reason=reason)
    x = torch.randn(1, 150, 72).bfloat16().to(device)

    def call():
        torch.manual_seed(0)
        return pytree.tree_leaves(CALLS[name](x))

    with _tuned.watching() as asked:
        expected = call()
    assert asked
    for tunable, fields in {tunable.kernel: (tunable, fields) for tunable, fields in asked}.values():
        candidates = list(tunable.candidates(_tuned.INTERPRETED, **fields))
        for tile in random.Random(name).sample(candidates, min(2, len(candidates))):
            with tunable.forced(tile):
                for got, want in zip(call(), expected, strict=True):
                    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (tunable.kernel, tile)
