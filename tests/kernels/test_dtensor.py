"""DTensor: every public function on sharded tensors, with gradients, gives the shard of the whole result."""

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

import vidmem_kernels as vk

pytest.importorskip("torch.distributed.tensor")
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

RANKS = 2


@pytest.fixture(scope="module")
def mesh():
    """Two ranks of which this process is the first; the other does not exist, so nothing may be communicated."""
    if dist.is_initialized():
        pytest.skip("another test holds the process group")
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def functions():
    """name: (function, tensors, axes of the heads in these and in the results or None)."""
    x, q = torch.randn(4, 6, 8), torch.randn(4, 6, 2, 8)
    index = torch.tensor([[2, 0, -1, 5], [1, 1, 3, 4]]).repeat(2, 1)
    plan = vk.match_tokens(x, 2)
    lse, bias = torch.randn(4, 2, 6), torch.randn(4, 6)
    S, z = torch.randn(4, 2, 8, 8).abs(), torch.randn(4, 2, 8).abs()
    times = torch.arange(6.0).expand(4, 6)
    blocks = torch.tensor([[[[0], [1], [2]]]]).expand(4, 1, 3, 1)

    def attend(q, k, b, t, i):
        return vk.cross_attention(
            q, k, k, key_bias=b, q_time=t, k_time=t, window=(3, 3), block_index=i, block_size=(2, 2), return_lse=True
        )

    def remember(q, k, S, z):
        return vk.linear_attention(q, k, q, state=vk.LinearAttentionState(S, z), return_state=True)

    return {
        "gather_tokens": (vk.gather_tokens, [x, index]),
        "scatter_add_tokens": (lambda s, i: vk.scatter_add_tokens(s, i, 6), [x[:, :4], index]),
        "quantize_rows": (vk.quantize_rows, [x]),
        "select_tokens": (lambda x: vk.select_tokens(x, 3), [x]),
        "topk_blocks": (lambda q, k: vk.topk_blocks(q, k, block_size=(2, 2), topk=2), [q, q + 1]),
        "match_tokens": (lambda x: vk.match_tokens(x, 2), [x]),
        "match_neighbors": (lambda x: vk.match_neighbors(x, 2, grid=(1, 2, 3)), [x]),
        "merge_tokens": (lambda x, *p: vk.merge_tokens(x, vk.MergePlan(*p)), [x, *plan]),
        "unmerge_tokens": (lambda y, *p: vk.unmerge_tokens(y, vk.MergePlan(*p)), [x[:, :4], *plan]),
        "linear_attention": (remember, [q, q + 1, S, z], (2, 2, 1, 1), (2, 1, 1)),
        "cross_attention": (attend, [q, q + 1, bias, times, blocks], (2, 2, None, None, None), (2, 1)),
        "merge_attention_states": (
            lambda a, b, c, d: vk.merge_attention_states([a, b], [c, d]), [q, q + 1, lse, lse - 1], (2, 2, 1, 1), (2, 1)
        ),
    }  # fmt: skip


def first_half(tensor, axis):
    return tensor if axis is None else tensor.chunk(RANKS, axis)[0]


def check(mesh, name, axes, result_axes):
    call, tensors, *_ = functions()[name]
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point() and "time" not in name) for t in tensors]
    whole = [t for t in pytree.tree_leaves(call(*leaves)) if isinstance(t, torch.Tensor)]
    shards = [
        DTensor.from_local(first_half(t, axis).detach(), mesh, [Replicate() if axis is None else Shard(axis)],
                           run_check=False, shape=t.shape, stride=t.stride()).requires_grad_(t.requires_grad)
        for t, axis in zip(leaves, axes, strict=True)
    ]  # fmt: skip
    found = [t for t in pytree.tree_leaves(call(*shards)) if isinstance(t, torch.Tensor)]
    for part, full, axis in zip(found, whole, result_axes or [0] * len(whole), strict=True):
        assert part.placements == (Shard(axis),) and part.shape == full.shape
        torch.testing.assert_close(part.to_local(), first_half(full, axis), equal_nan=True)
    if not any(t.requires_grad for t in whole):
        return
    for used in (slice(None), slice(0, 1)):  # all results, and only the first
        if any(t.requires_grad for t in whole[used]):
            check_gradients(leaves, shards, whole[used], found[used], axes)


def check_gradients(leaves, shards, whole, found, axes):
    grads = [torch.autograd.grad(sum(t.float().sum() for t in results if t.requires_grad), inputs, allow_unused=True,
                                 retain_graph=True)
             for results, inputs in ((whole, [t for t in leaves if t.requires_grad]),
                                     (found, [t for t in shards if t.requires_grad]))]  # fmt: skip
    for full, part, axis in zip(*grads, [a for a, t in zip(axes, leaves, strict=True) if t.requires_grad], strict=True):
        if full is None or part.placements == (Partial(),):
            assert full is None or axis is None
            continue
        assert part.placements == (Shard(axis),)
        torch.testing.assert_close(part.to_local(), first_half(full, axis))


@pytest.mark.parametrize("name", sorted(functions()))
def test_sharded_along_the_batch(name, mesh):
    count = len(functions()[name][1])
    check(mesh, name, [0] * count, None)


@pytest.mark.parametrize("name", sorted(n for n, case in functions().items() if len(case) == 4))
def test_sharded_along_the_heads(name, mesh):
    check(mesh, name, *functions()[name][2:])
