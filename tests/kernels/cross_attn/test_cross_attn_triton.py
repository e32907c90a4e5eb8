"""The Triton kernels of cross-attention: features, shapes, special values, skipped tiles, against a dense mask."""

import math

import pytest
import torch
from attention_helpers import arguments, by_sdpa

from vidmem_kernels import _dispatch, cross_attention, explain, testing
from vidmem_kernels._op import OPS

pytest.importorskip("triton")

INF, F64 = math.inf, torch.float64
FEATURES = ["", "bias", "window", "blocks", "sinks window", "sinks blocks", "bias sinks window blocks"]


@pytest.fixture(autouse=True)
def available(device):
    reason = _dispatch.unavailable(OPS["cross_attention"], "triton", device)
    if reason is not None:
        pytest.skip(reason=reason)


def on(device, values):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in values]


def run(args, options, device, backend="triton"):
    """(out, lse) of the kernel and the gradients of a projection of both."""
    inputs = testing.with_grad(tuple(on(device, (*args, *options.values()))))
    results = testing.run(OPS["cross_attention"], inputs, backend)
    return results, testing.gradients(inputs[:4], projectable(results))


def projectable(results):
    """Without the lse of queries that see nothing, whose gradient is no number in autograd."""
    return results[0], results[1].masked_fill(results[1] == -INF, 0)


def yardstick(args, options):
    """What sets the budget of results and gradients: in float32 the reference ops, whose gradients pay for the rounding
    of out and lse as those of every backend do, in half precision the composition."""
    if args[0].dtype not in testing.HALF:
        return run(args, options, "cpu", "reference")
    inputs = testing.with_grad((*args, *options.values()))
    results = testing.yardstick("cross_attention", inputs)(*inputs)
    return results, testing.gradients(inputs[:4], projectable(results))


def check(args, options, device, what="", derived=True):
    """Results and gradients within the yardstick's budget, against float64 with a dense mask. Without `derived`, for
    shapes of too few numbers to derive a budget from, gradients have a fixed tolerance in float32."""
    got, grads = run(args, options, device)
    single, single_grads = yardstick(args, options)
    wide = testing.with_grad(testing.to_float64((*args, options["key_bias"])))
    exact = by_sdpa(*wide[:3], options | {"key_bias": wide[3]})
    testing.assert_within_budget(on("cpu", got), single, exact, what)
    exact_grads = testing.gradients(wide, projectable(exact), like=single)
    if derived or args[0].dtype != torch.float32:
        testing.assert_within_budget(on("cpu", grads), single_grads, exact_grads, f"gradients {what}")
    else:
        for grad, expected in zip(on("cpu", grads), exact_grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
    return got, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", FEATURES)
def test_features(which, dtype, device):
    *args, options = arguments(which, 1, 70, 150, dtype=dtype)
    check(args, options, device, which)


@pytest.mark.parametrize(
    "queries, keys, size, value_size",
    [(1, 1, 1, 1), (1, 97, 17, 3), (33, 1, 3, 17), (5, 40, 256, 256), (40, 33, 72, 200)],
)
def test_shapes(queries, keys, size, value_size, device):
    for dtype in (torch.float32, torch.bfloat16):
        *args, options = arguments("bias sinks window blocks", 1, queries, keys, 2, size, value_size, dtype)
        check(args, options, device, f"{dtype}", derived=False)


@pytest.mark.parametrize(
    "queries, keys, block_size",
    [(9, 11, (1, 1)), (30, 40, (7, 5)), (160, 190, (150, 90)), (160, 190, (200, 300))],
    ids=str,
)
def test_blocks_of_any_size(queries, keys, block_size, device):
    *args, options = arguments("bias", 1, queries, keys, 2, 8, 4)
    block_q, block_k = block_size
    index = torch.randint(-1, -(-keys // block_k), (1, 1, -(-queries // block_q), 3))
    index[..., 2] = index[..., 0]  # a block given twice counts once
    options |= {"block_index": index, "block_size": [block_q, block_k], "num_sinks": min(20, keys // 2)}
    check(args, options, device, derived=False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, F64], ids=str)
def test_window_of_shuffled_times(dtype, device):
    *args, options = arguments("", 2, 70, 90, 1, 8, 8)
    q_time, k_time = torch.randint(0, 40, (2, 70)).to(dtype), torch.randint(0, 40, (90,)).to(dtype)
    for left, right in ((3, 0), (INF, 2.5), (0, INF)):
        check(args, options | {"q_time": q_time, "k_time": k_time, "window": [left, right]}, device, f"{left} {right}")


def test_times_compare_exactly(device):
    *args, options = arguments("", 1, 3, 6, 1, 4, 4)
    far = 2**40
    options |= {"q_time": torch.tensor([far, far + 1, far + 2]), "window": [0.0, 0.0]}
    options["k_time"] = torch.arange(far - 1, far + 5)
    out = run(args, options, device)[0][0].cpu()
    assert torch.equal(out[:, :, 0], args[2][:, 1:4, 0])  # query i sees key i + 1 alone
    # In float32 a bound is rounded: 2**24 + 1 is 2**24.
    options |= {name: torch.full((n,), 2.0**24) for name, n in (("q_time", 3), ("k_time", 6))}
    options["k_time"][1:] += 2
    options["window"] = [0.0, 1.0]
    check(args, options, device, derived=False)


def test_times_that_are_no_number(device):
    *args, options = arguments("window", 1, 40, 90, 1, 4, 4)
    options["q_time"][::7] = torch.nan
    options["k_time"] = options["k_time"].clone()
    options["k_time"][:, ::5] = torch.nan
    options["q_time"][1], options["k_time"][:, 3] = INF, -INF
    got, _ = check(args, options, device)
    assert (got[0][:, ::7] == 0).all()


def test_nothing_visible(device):
    *args, options = arguments("blocks bias", 1, 40, 60, 2, 8, 8)
    options["block_index"].fill_(-1)
    (out, lse), grads = run(args, options, device)
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert all((g == 0).all() for g in grads)
    *args, options = arguments("bias", 1, 40, 60, 2, 8, 8)
    options["key_bias"].fill_(-INF)
    (out, lse), grads = run(args, options, device)
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(dtype, device):
    *args, options = arguments("bias sinks window blocks", 1, 40, 90, 1, 16, 8, dtype, factor=100.0)
    options["scale"] = 1.0
    got, grads = run(args, options, device)
    expected, expected_grads = run(args, options, "cpu", "reference")
    torch.testing.assert_close(on("cpu", got), list(expected), rtol=1e-2, atol=1e-2)
    # Weights of lse = 1e4 are as rough as a rounding of it, in any implementation.
    close = {"rtol": 1e-2, "atol": 1.0} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4.0}
    torch.testing.assert_close(on("cpu", grads), list(expected_grads), **close)
    for offset in (-1e4, 1e4):
        *args, options = arguments("", 1, 40, 90, 1, 16, 8, dtype)
        options["key_bias"] = torch.randn(1, 90) + offset
        check(args, options, device, f"{offset}")


def test_bias_of_float64_for_all_heads(device):
    *args, options = arguments("", 2, 20, 70, 3)
    options["key_bias"] = torch.randn(2, 70, dtype=F64)
    options["key_bias"][:, 3] = -INF
    check(args, options, device)


def test_strides_do_not_matter(device):
    make = testing.Make()
    *args, options = arguments("bias window blocks sinks", 2, 40, 90)
    spread = {n: make.strided(t) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    (got, grads), (same, same_grads) = (
        run(a, o, device) for a, o in (([make.strided(t) for t in args], spread), (args, options))
    )
    assert all(map(torch.equal, (*got, *grads), (*same, *same_grads)))


def test_runs_agree_to_the_bit(device):
    *args, options = arguments("bias window blocks sinks", 1, 70, 150, dtype=torch.bfloat16)
    first, second = (run(args, options, device) for _ in range(2))
    assert all(map(torch.equal, (*first[0], *first[1]), (*second[0], *second[1])))


@pytest.mark.parametrize("which", ["window", "blocks"])
def test_tiles_that_no_query_sees_are_not_loaded(which, device):
    *args, options = arguments("sinks", 1, 130, 640, 1, 8, 8)
    hidden = torch.ones(640, dtype=torch.bool)
    hidden[:3] = False
    if which == "window":
        # Keys of all times, but those of time 1 and 2 only in the tiles of keys 256 to 383.
        options |= {"q_time": torch.arange(130) % 2 + 1, "k_time": torch.full((640,), 9), "window": [0.0, 0.0]}
        options["k_time"][256:384] = torch.arange(128) % 2 + 1
    else:
        options |= {"block_index": torch.tensor([2, -1, 2]).repeat(1, 1, 2, 1), "block_size": [128, 128]}
    hidden[256:384] = False
    hidden[:64] = False  # of the tile of the sinks
    poisoned = [t.clone() for t in args]
    for t in poisoned[1:]:
        t[:, hidden] = torch.nan
    got, grads = run(poisoned, options, device)
    expected, expected_grads = run(args, options, device)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(grads[0], expected_grads[0])
    for grad, clean in zip(grads[1:3], expected_grads[1:3], strict=True):
        assert torch.equal(grad[:, ~hidden], clean[:, ~hidden])
        assert (clean[:, hidden] == 0).all()


def test_bad_blocks_are_an_error(device):
    *args, options = arguments("blocks", 1, 40, 60, 1, 4, 4)
    options["block_index"][0, 0, 0, 0] = 3
    with pytest.raises(IndexError, match=r"block_index must be in \[-1, 2\], got 3"):
        run(args, options, device)


def test_refusals(device):
    def why(dtype=torch.float32, size=8, value_size=8):
        q, v = (torch.randn(1, 3, 1, n, dtype=dtype, device=device) for n in (size, value_size))
        with pytest.raises(_dispatch.BackendError) as error:
            explain(cross_attention, q, q, v, backend="triton")
        return str(error.value)

    assert "float64 is for checks and runs the reference" in why(F64)
    assert "needs D and Dv of 1 to 256, got 257 and 8" in why(size=257)
    assert "needs D and Dv of 1 to 256, got 8 and 0" in why(value_size=0)
