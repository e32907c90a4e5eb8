"""DTensor: every public function on sharded tensors, with gradients, gives the shard of the whole result."""

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

import vidmem_kernels as vk
from vidmem_kernels._op import OPS
from vidmem_kernels.testing import Make, named_call, public_calls

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


SIZES = {"B": 4, "H": 2, "L": 6, "Lq": 6, "Lk": 6, "N": 6, "D": 8, "C": 8}  # all others 3


def axes_of(call, name):
    """Of every tensor, the axis that is sharded: that of B or H; None where it has none."""
    return [shape.split().index(name) if name in shape.split() else None for shape in call.shapes]


def tensors_of(call):
    return call.make(Make(), {dim: SIZES.get(dim, 3) for dim in call.names})


def attend_in_batches(q, k, b, t, i):
    return vk.cross_attention(
        q, k, k, key_bias=b, q_time=t, k_time=t, window=(3, 3), block_index=i, block_size=(2, 2), return_lse=True
    )


def times_of_a_batch(m, s):
    """Times of one kind for queries and keys, blocks that are one memory for all."""
    q, times = m.randn(4, 6, 2, 8), torch.arange(6.0).expand(4, 6)
    blocks = torch.tensor([[[[0], [1], [2]]]]).expand(4, 1, 3, 1)
    return q, q + 1, m.randn(4, 6), times, blocks


CALLS = {str(call): call for call in public_calls() if hasattr(torch.ops.vidmem, call.function)}
SHAPES = ("B Lq H D", "B Lk H D", "B Lk", "B Lq", "B 1 blocks topk")
CALLS["cross_attention[times of a batch]"] = named_call(
    "cross_attention", "times of a batch", attend_in_batches, *SHAPES, make=times_of_a_batch
)
# A gradient that all batches share would have to be summed over ranks.
ALONG_BATCH = [
    name
    for name, call in CALLS.items()
    if not {i for i, axis in enumerate(axes_of(call, "B")) if axis is None} & set(call.floats(tensors_of(call)))
]
ALONG_HEADS = [
    name
    for name, call in CALLS.items()
    if OPS[call.function].result_heads and any(axis is not None for axis in axes_of(call, "H"))
]


def first_half(tensor, axis):
    return tensor if axis is None else tensor.chunk(RANKS, axis)[0]


def check(mesh, name, axes, result_axes):
    call = CALLS[name]
    tensors = tensors_of(call)
    floats = call.floats(tensors)
    leaves = [t.detach().clone().requires_grad_(i in floats) for i, t in enumerate(tensors)]
    whole = [t for t in pytree.tree_leaves(call.call(*leaves)) if isinstance(t, torch.Tensor)]
    shards = [
        DTensor.from_local(first_half(t, axis).detach(), mesh, [Replicate() if axis is None else Shard(axis)],
                           run_check=False, shape=t.shape, stride=t.stride()).requires_grad_(t.requires_grad)
        for t, axis in zip(leaves, axes, strict=True)
    ]  # fmt: skip
    found = [t for t in pytree.tree_leaves(call.call(*shards)) if isinstance(t, torch.Tensor)]
    for part, full, axis in zip(found, whole, result_axes[: len(whole)], strict=True):
        assert part.placements == (Shard(axis),) and part.shape == full.shape
        torch.testing.assert_close(part.to_local(), first_half(full, axis), equal_nan=True)
    if not any(t.requires_grad for t in whole):
        return
    for used in (slice(None), slice(0, 1)):  # all results, and only the first
        if any(t.requires_grad for t in whole[used]):
            check_gradients(leaves, shards, whole[used], found[used], axes)


def weighted(t):
    """A sum whose gradient is sharded as `t` is."""
    return (t.float() * t.detach().float().nan_to_num().cos()).sum()


def check_gradients(leaves, shards, whole, found, axes):
    grads = [torch.autograd.grad(sum(weighted(t) for t in results if t.requires_grad), inputs, allow_unused=True,
                                 retain_graph=True)
             for results, inputs in ((whole, [t for t in leaves if t.requires_grad]),
                                     (found, [t for t in shards if t.requires_grad]))]  # fmt: skip
    for full, part, axis in zip(*grads, [a for a, t in zip(axes, leaves, strict=True) if t.requires_grad], strict=True):
        if full is None or part.placements == (Partial(),):
            assert full is None or axis is None
            continue
        assert part.placements == (Shard(axis),)
        torch.testing.assert_close(part.to_local(), first_half(full, axis))


def test_every_declared_function_is_sharded():
    assert {call.function for call in CALLS.values()} == {CALLS[name].function for name in ALONG_BATCH}


@pytest.mark.parametrize("name", sorted(ALONG_BATCH))
def test_sharded_along_the_batch(name, mesh):
    check(mesh, name, axes_of(CALLS[name], "B"), [0] * 4)


@pytest.mark.parametrize("name", sorted(ALONG_HEADS))
def test_sharded_along_the_heads(name, mesh):
    check(mesh, name, axes_of(CALLS[name], "H"), OPS[CALLS[name].function].result_heads)
