"""The Triton kernels of cross-attention: features, shapes, special values, skipped tiles, against a dense mask."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from attention_helpers import arguments, by_sdpa

from vidmem_kernels import _dispatch, cross_attention, explain, testing
from vidmem_kernels._op import OPS

pytest.importorskip("triton")
from vidmem_kernels._tuned import arch_of  # noqa: E402
from vidmem_kernels.cross_attn import triton_attention, triton_attention_grad  # noqa: E402
from vidmem_kernels.cross_attn import triton_attention_specialised as specialised  # noqa: E402
from vidmem_kernels.cross_attn.triton_attention_grad import one_pass_allowed, tiles_cross_attention_bwd  # noqa: E402
from vidmem_kernels.cross_attn.triton_tiles import FORWARD, GRAD_KV, GRAD_Q  # noqa: E402

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


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", FEATURES)
def test_features(which, dtype, device):
    *args, options = arguments(which, 1, 70, 150, dtype=dtype)
    check(args, options, device, which)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "queries, keys, size, value_size",
    [(1, 1, 1, 1), (1, 97, 17, 3), (33, 1, 3, 17), (5, 40, 256, 256), (40, 33, 72, 200)],
)
def test_shapes(queries, keys, size, value_size, device):
    for dtype in (torch.float32, torch.bfloat16):
        *args, options = arguments("bias sinks window blocks", 1, queries, keys, 2, size, value_size, dtype)
        check(args, options, device, f"{dtype}", derived=False)


@pytest.mark.sample(1)
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


@pytest.mark.sample(1)
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


@pytest.mark.sample(1)
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
    if device == "cpu":
        with pytest.raises(IndexError, match=r"block_index must be in \[-1, 2\], got 3"):
            run(args, options, device)


@pytest.mark.sample(1)
@pytest.mark.parametrize("bad", [3, -2, 2**31 - 1])
def test_bad_blocks_are_no_number_where_looking_would_wait(bad, device, monkeypatch):
    for module in (triton_attention, triton_attention_grad):
        monkeypatch.setattr(module, "check_blocks", lambda *_: None)
    *args, options = arguments("blocks sinks", 1, 70, 60, 2, 4, 4)
    (out, lse), _ = run(args, options, device)
    options["block_index"][0, 1, 1, 2] = bad  # queries 32 to 63 of head 1
    (other, other_lse), grads = run(args, options, device)
    assert other[0, 32:64, 1].isnan().all() and other_lse[0, 1, 32:64].isnan().all()
    assert grads[0][0, 32:64, 1].isnan().all()
    other[0, 32:64, 1], other_lse[0, 1, 32:64] = out[0, 32:64, 1], lse[0, 1, 32:64]
    assert torch.equal(other, out) and torch.equal(other_lse, lse)


def test_refusals(device):
    def why(dtype=torch.float32, size=8, value_size=8):
        q, v = (torch.randn(1, 3, 1, n, dtype=dtype, device=device) for n in (size, value_size))
        with pytest.raises(_dispatch.BackendError) as error:
            explain(cross_attention, q, q, v, backend="triton")
        return str(error.value)

    assert "float64 is only run by the reference, for checks" in why(F64)
    assert "needs D and Dv of 1 to 256, got 257 and 8" in why(size=257)
    assert "needs D and Dv of 1 to 256, got 8 and 0" in why(value_size=0)


def all_of(tunable, arch, **fields):
    return [tunable.default(arch, **fields), *tunable.candidates(arch, **fields)]


@pytest.mark.sample(1)
@pytest.mark.parametrize("which", ["", "bias", "blocks bias"])
def test_specialised_warps(which, device, monkeypatch):
    """The form with descriptors is right wherever it is taken, and not taken where a descriptor cannot be."""
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "STAGES": 2, "HOIST": True, "num_warps": 4, "WARP_SPECIALIZE": True}
    taken = []
    launch = specialised.launch
    monkeypatch.setattr(specialised, "launch", lambda *args: taken.append(args) or launch(*args))
    for queries, keys, size, value_size, dtype in (
        (70, 160, 16, 8, torch.bfloat16),
        (64, 260, 16, 16, torch.float16),
        (33, 300, 24, 40, torch.bfloat16),
    ):
        *args, options = arguments("", 1, queries, keys, 2, size, value_size, dtype)
        if "bias" in which:
            bias = torch.randn(1, 2, -(-keys // 4) * 4)  # rows of it start at multiples of 16 bytes
            bias[:, :, ::5] = -INF
            options["key_bias"] = bias[..., :keys]
        if "blocks" in which:
            shape = (1, 2, -(-queries // 32), 3)
            options |= {"block_index": torch.randint(-1, -(-keys // 64), shape), "block_size": [32, 64]}
        with FORWARD.forced(tile):
            taken.clear()
            check(args, options, device, f"{which} {queries} {keys}")
            assert taken, (which, queries, keys)
    with FORWARD.forced(tile):
        for unfit in ("window", "sinks blocks", "blocks"):  # blocks of 24 keys are not made of tiles of 32
            *args, options = arguments(unfit, 1, 70, 150, 2, 16, 8, torch.bfloat16)
            taken.clear()
            check(args, options, device, unfit)
            assert not taken
        *args, options = arguments("", 1, 70, 150, 2, 17, 8, torch.bfloat16)  # rows of 34 bytes
        check(args, options, device)
        assert not taken


def test_a_tile_that_is_not_specialised_is_taken_once(monkeypatch, caplog, device):
    """Triton leaves such a kernel as it is, silently: the compiled kernel says so by its warps."""
    tile = {"num_warps": 4}
    left, right = (SimpleNamespace(metadata=SimpleNamespace(num_warps=n)) for n in (4, 12))
    monkeypatch.setattr(specialised, "unspecialised", set())
    device = torch.device(device)
    specialised.launch(lambda: right, tile, "bf16 128", device)
    assert not specialised.unspecialised and not caplog.messages
    specialised.launch(lambda: left, tile, "bf16 128 bias", device)
    assert specialised.unspecialised == {"bf16 128 bias"} and "specialised no warps" in caplog.text
    q = torch.zeros(1, 4, 1, 8, device=device)
    assert "specialises no warps" in specialised.why_not(None, tile, "bf16 128 bias", q, q, q)


def test_negative_and_zero_scale(device):
    """Where scores are not scaled by a positive number their maximum is not that of the products."""
    for scale in (-0.3, 0.0):
        for which in ("", "bias sinks window blocks"):
            *args, options = arguments(which, 1, 40, 280, 2, 8, 8, torch.bfloat16)
            got, _ = run(args, options | {"scale": scale}, device)
            expected, _ = yardstick(args, options | {"scale": scale})
            torch.testing.assert_close(on("cpu", got), list(expected), rtol=2e-2, atol=2e-2)


@pytest.mark.sample(1)
@pytest.mark.parametrize("which", ["bias", "window", "sinks blocks", "bias sinks window blocks"])
def test_gradient_in_one_pass(which, device):
    """Within the same budget as in two."""
    if not one_pass_allowed(arch_of(torch.device(device))):
        pytest.skip(reason="this Triton compiles it wrong")
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "STAGES": 1, "HOIST": False, "num_warps": 4, "ONE_PASS": True}
    *args, options = arguments(which, 1, 300, 270, 2, 8, 8, torch.bfloat16)
    with GRAD_KV.forced(tile), GRAD_Q.forced({}):  # the other kernel cannot run
        check(args, options, device, which)


def test_when_a_gradient_may_take_one_pass(device):
    def order(dtype, keys=300):
        q, k, v = (torch.zeros(1, n, 1, 8, dtype=dtype, device=device) for n in (300, keys, keys))
        *_, chosen = tiles_cross_attention_bwd(
            q, None, q, k, v, None, q, q, 0, None, None, None, None, [128, 64], 1.0
        )  # fmt: skip
        return chosen.key.split()[-1]

    free = "any" if one_pass_allowed(arch_of(torch.device(device))) else "fixed"
    assert order(torch.bfloat16) == free
    assert order(torch.float32) == order(torch.bfloat16, keys=100) == "fixed"
    try:
        torch.use_deterministic_algorithms(True)
        assert order(torch.bfloat16) == "fixed"
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert order(torch.bfloat16) == free
    finally:
        torch.use_deterministic_algorithms(False)
    assert [one_pass_allowed(90, v) for v in ("3.3.1", "3.4.0", "3.6.0", "3.7.0", "3.7.1", "3.9.0+git1")] == [
        True, False, False, False, True, True,
    ]  # fmt: skip
    assert one_pass_allowed(100, "3.6.0")


@pytest.mark.parametrize("tunable", [FORWARD, GRAD_Q, GRAD_KV], ids=lambda t: t.kernel)
def test_tiles_have_the_same_constants(tunable):
    features = ("", "bias window", "bias few")
    for arch, dtype, size, words in product((80, 89, 90, 100, 103, 120), ("bf16", "fp32"), (64, 128, 256), features):
        fields = {"dtype": dtype, "size": size, "features": words}
        orders = ("any", "fixed") if "order" in tunable.fields else (None,)
        for order in orders:
            tiles = all_of(tunable, arch, **fields, **({"order": order} if order else {}))
            assert len({tuple(tile) for tile in tiles}) == 1
            assert order != "fixed" or not any(tile["ONE_PASS"] for tile in tiles)
            assert len(tiles) <= 20
