"""The attention backend in diffusers: for one model and one block of code, exact after it; what it lacks it says."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers_caches import CACHES, cache, denoise
from diffusers_checks import out_of
from diffusers_helpers import MODELS, draw_grid, inputs_of, tiny_hunyuan, tiny_wan
from paths import ROOT
from torch import nn

import vidmem_kernels as vk
from vidmem_kernels import vllm_omni
from vidmem_kernels.diffusers import add_memory_attention, attention_backend, register_attention_backend
from vidmem_kernels.foreign_attention import attend

every_layout = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def backends(model):
    """What every processor and diffusers itself have for a backend, and whether it is their own."""
    processors = [m.processor for m in model.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]
    own = [vars(p).get("_attention_backend", "the class's") for p in processors]
    return own, _AttentionBackendRegistry._active_backend, [*vars(AttentionBackendName)["_member_map_"]]


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of `cross_attention`, and keeps their options."""
    seen = []

    def counted(*args, **options):
        seen.append(options)
        return vk.cross_attention(*args, **options)

    monkeypatch.setattr("vidmem_kernels.foreign_attention.cross_attention", counted)
    return seen


@every_layout
def test_equals_native_inside_and_is_gone_outside(make, calls):
    model = make()
    inputs = inputs_of(model, draw_grid(1), batch=2)  # HunyuanVideo's texts differ in length: a mask hides keys
    before = out_of(model, inputs)
    register_attention_backend()
    is_as = backends(model)
    with attention_backend(model):
        torch.testing.assert_close(out_of(model, inputs), before, rtol=1e-5, atol=1e-5)
    attentions = len(calls)
    assert attentions >= 3
    assert backends(model) == is_as
    assert torch.equal(out_of(model, inputs), before) and len(calls) == attentions


def test_gradients():
    model = tiny_hunyuan(layers=1)
    inputs = inputs_of(model, (2, 3, 4), batch=2)
    leaves = [p for p in model.parameters()]
    expected = torch.autograd.grad(model(**inputs)[0].square().sum(), leaves, allow_unused=True)
    with attention_backend(model):
        got = torch.autograd.grad(model(**inputs)[0].square().sum(), leaves, allow_unused=True)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_only_this_model_and_only_these_attentions(calls):
    mine, other = tiny_wan(layers=2), tiny_wan(layers=2)
    inputs = inputs_of(mine, (2, 3, 3))
    with attention_backend(mine, only="attn1"):
        out_of(other, inputs)
        assert not calls
        out_of(mine, inputs)
        assert len(calls) == 2
    with attention_backend(mine, only=lambda name: name == "blocks.1.attn2"):
        out_of(mine, inputs)
    assert len(calls) == 3


def test_features_nest_and_are_restored_after_errors(calls):
    model = tiny_wan(layers=1)
    inputs = inputs_of(model, (2, 3, 4))
    register_attention_backend()
    with attention_backend(model, backend="reference"):  # makes its member, which stays
        pass
    is_as = backends(model)
    model.blocks[0].attn1.processor._attention_backend = AttentionBackendName.NATIVE  # its own, not the class's
    own = backends(model)
    frame = torch.arange(2 * 3 * 4) // 12
    with attention_backend(model, only="attn1", window=(0, 0), q_time=frame, k_time=frame):
        windowed = out_of(model, inputs)
        with attention_backend(model, backend="reference"):
            out_of(model, inputs)
            with pytest.raises(ZeroDivisionError), attention_backend(model, num_sinks=1):
                1 / 0  # noqa: B018
            out_of(model, inputs)
        assert torch.equal(out_of(model, inputs), windowed)
    kinds = [[*options][2:] for options in calls]
    window = ["window", "q_time", "k_time"]
    assert kinds == [window, *[["backend"]] * 4, window]
    assert backends(model)[0] == own[0]
    del model.blocks[0].attn1.processor._attention_backend
    assert backends(model)[:2] == is_as[:2]
    # A frame sees itself alone: as two videos of one frame, but for the position that cancels.
    single = [inputs | {"hidden_states": inputs["hidden_states"][:, :, i : i + 1]} for i in range(2)]
    expected = torch.cat([out_of(model, each) for each in single], 2)
    torch.testing.assert_close(windowed, expected, rtol=1e-4, atol=1e-5)


def test_blocks_found_from_queries_and_keys():
    model = tiny_wan(layers=1)
    inputs = inputs_of(model, (2, 4, 4))

    def wanted(topk):
        return lambda q, k: vk.topk_blocks(q, k, block_size=(8, 8), topk=topk)

    expected = out_of(model, inputs)
    with attention_backend(model, only="attn1", block_index=wanted(4), block_size=(8, 8)):
        torch.testing.assert_close(out_of(model, inputs), expected, rtol=1e-5, atol=1e-5)
    with attention_backend(model, only="attn1", block_index=wanted(1), block_size=(8, 8)):
        assert not torch.allclose(out_of(model, inputs), expected, atol=1e-3)


def test_threads_and_blocks_that_end_in_any_order(calls):
    models = [tiny_wan(layers=1, seed=i) for i in range(4)]
    inputs = inputs_of(models[0], (2, 3, 3))
    expected = [out_of(model, inputs) for model in models]
    register_attention_backend()
    errors = []

    def work(i):
        try:
            for turn in range(8):
                if (i + turn) % 2:
                    with attention_backend(models[i], num_sinks=i):
                        got = out_of(models[i], inputs)
                else:
                    got = out_of(models[i], inputs)
                torch.testing.assert_close(got, expected[i], rtol=1e-5, atol=1e-5)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors

    model = models[0]
    is_as = backends(model)
    first, second = attention_backend(model, num_sinks=1), attention_backend(model, backend="reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    calls.clear()
    out_of(model, inputs)
    assert calls and all(options.get("backend") == "reference" for options in calls)
    second.__exit__(None, None, None)
    assert backends(model)[:2] == is_as[:2]


def test_many_blocks_leave_nothing():
    model = tiny_wan(layers=1)
    with attention_backend(model, num_sinks=1):
        pass
    is_as = backends(model)
    for _ in range(200):
        with attention_backend(model, num_sinks=1), attention_backend(model, q_time=torch.zeros(3)):
            pass
    assert backends(model) == is_as
    with attention_backend(model, key_bias=lambda q, k: torch.zeros(q.shape[0], k.shape[1])):
        copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match="block must still be open, got a call after its end"):
        copied(**inputs_of(model, (2, 3, 3)))


def test_through_the_memory_of_an_adapter(calls):
    model = tiny_hunyuan(layers=1)
    inputs = inputs_of(model, (2, 3, 3))
    expected = out_of(model, inputs)
    m = add_memory_attention(model)
    is_as = backends(model)
    with attention_backend(model):
        m.remove()
        torch.testing.assert_close(out_of(model, inputs), expected, rtol=1e-5, atol=1e-5)
        assert len(calls) == 2
        m = add_memory_attention(model)
        out_of(model, inputs)
        assert len(calls) == 4
    assert backends(model) == is_as
    m.remove()
    assert torch.equal(out_of(model, inputs), expected)


def test_set_attention_backend_knows_it(calls):
    """diffusers' own way, for the whole process."""
    register_attention_backend("vidmem")
    register_attention_backend("vidmem")
    model = tiny_wan(layers=1)
    inputs = inputs_of(model, (2, 3, 3))
    expected = out_of(model, inputs)
    before = _AttentionBackendRegistry._active_backend
    try:
        model.set_attention_backend("vidmem")
        torch.testing.assert_close(out_of(model, inputs), expected, rtol=1e-5, atol=1e-5)
        assert calls
    finally:
        _AttentionBackendRegistry.set_active_backend(before)
    assert AttentionBackendName("vidmem").value == "vidmem" and "VIDMEM" in AttentionBackendName.__members__


def qkv(batch=2, length=5, keys=7, heads=4, kv_heads=4, size=8, dtype=torch.float32):
    shapes = (length, heads), (keys, kv_heads), (keys, kv_heads)
    return [torch.randn(batch, n, h, size).to(dtype) for n, h in shapes]


def sdpa(q, k, v, mask=None, **options):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, **options).transpose(1, 2)


@pytest.mark.parametrize("seed", range(12))
def test_the_call_of_sdpa(seed):
    """Every mask over keys, fewer heads of keys, scale, odd lengths, half precision."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    torch.manual_seed(seed)
    batch, heads, keys = pick(1, 2, 3), pick(2, 4, 6), pick(1, 7, 33)
    kv_heads = pick(1, 2, heads)
    dtype = pick(torch.float32, torch.float32, torch.bfloat16)
    q, k, v = qkv(batch, pick(1, 5, 20), keys, heads, kv_heads, pick(8, 12), dtype)
    shape = pick(1, batch), pick(1, heads), 1, keys
    mask = pick(None, torch.randn(shape), torch.rand(shape) < 0.7)
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
    scale = pick(None, 0.3)
    gqa = heads != kv_heads
    got = dispatch_attention_fn(q, k, v, mask, scale=scale, enable_gqa=gqa, backend=_name())
    expected = sdpa(
        q, k, v, mask if mask is None or mask.dtype == torch.bool else mask.to(dtype), scale=scale, enable_gqa=gqa
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got, expected, **tolerance)


def _name():
    register_attention_backend()
    return "vidmem"


def test_log_sum_exp_for_context_parallelism():
    q, k, v = qkv()
    out, lse = dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True}, backend=_name())
    scores = torch.einsum("blhd,bmhd->blhm", q, k) * 8**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert lse.shape == (2, 5, 4) and torch.equal(out, attend("test", q, k, v))


def test_what_it_cannot_do_it_says():
    q, k, v = qkv()
    pairs = torch.ones(5, 7, dtype=torch.bool)
    for options, message in [
        ({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"),
        ({"is_causal": True}, "is_causal must be False, got True"),
        ({"attn_mask": pairs}, "attn_mask must have shape (2 or 1, 4 or 1, 1, 7), a mask over keys, got (5, 7)"),
        ({"attn_mask": pairs[None, None]}, "a mask over keys, got (1, 1, 5, 7)"),
        ({"attn_mask": pairs[:1, :1, None, None]}, "a mask over keys, got (1, 1, 1, 1)"),
        ({"attn_mask": pairs[None, None, :1].expand(3, -1, -1, -1)}, "a mask over keys, got (3, 1, 1, 7)"),
        ({"attention_kwargs": {"softcap": 3.0}}, "arguments must be among query, key,"),
        ({"parallel_config": "ring"}, "the model must run without context parallelism, got ring"),
    ]:
        with pytest.raises(ValueError) as raised:
            dispatch_attention_fn(q, k, v, backend=_name(), **options)
        assert str(raised.value).startswith("vidmem attention backend: ") and message in str(raised.value)
    with pytest.raises(TypeError, match="attn_mask must be bool or of a float dtype, got torch.int64"):
        dispatch_attention_fn(q, k, v, torch.ones(1, 1, 1, 7).long(), backend=_name())
    with pytest.raises(ValueError, match="the number of key heads must divide that of query heads, got 3 and 4"):
        dispatch_attention_fn(q, *(x[:, :, :3] for x in (k, v)), enable_gqa=True, backend=_name())
    with pytest.raises(
        ValueError, match="enable_gqa must be True if keys and queries have different numbers of heads, got 2 and 4"
    ):
        dispatch_attention_fn(q, *(x[:, :, :2] for x in (k, v)), backend=_name())


def test_wrong_use():
    model = tiny_wan(layers=1)
    for call, error, message in [
        (lambda: attention_backend(None), TypeError, "attention_backend: model must be a module, got NoneType"),
        (lambda: attention_backend(nn.Linear(3, 3)), ValueError, "model must have attentions that ask diffusers"),
        (lambda: attention_backend(model, only="attn9"), ValueError, "with none that is 'attn9'"),
        (lambda: attention_backend(model, dropout=1), TypeError, "features must be among backend,"),
        (lambda: attention_backend(model, "native"), ValueError, "name must not be a backend of diffusers already"),
    ]:
        with pytest.raises(error) as raised, call():
            pass
        assert message in str(raised.value)
    for name, error in [("Flash", ValueError), ("", ValueError), ("flash", ValueError), (3, TypeError)]:
        with pytest.raises(error, match="register_attention_backend: name must"):
            register_attention_backend(name)


@pytest.mark.long
def test_compiled():
    model = tiny_hunyuan(layers=1)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs = inputs_of(model, (2, 3, 5), batch=2)
    with torch.no_grad():
        native = fast(**inputs)[0]
        for _ in range(2):
            with attention_backend(model):
                torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(fast(**inputs)[0], native)


def test_the_plugin_of_vllm_omni():
    entry = '[project.entry-points."vllm_omni.sparse_attn"]\nvidmem = "vidmem_kernels.vllm_omni:attention"\n'
    assert entry in (ROOT / "pyproject.toml").read_text()
    q, k, v = qkv(length=24, keys=24)
    kwargs = {"is_causal": False, "softmax_scale": 8**-0.5}
    dense = sdpa(q, k, v)
    torch.testing.assert_close(vllm_omni.attention(q, k, v, {"denoise_step_idx": 3}, **kwargs), dense)
    few = vllm_omni.attention(q, k[:, :, :2], v[:, :, :2], {}, **kwargs)
    torch.testing.assert_close(few, sdpa(q, k[:, :, :2], v[:, :, :2], enable_gqa=True))
    mask = torch.rand(2, 1, 1, 24) < 0.7
    mask[..., 0] = True
    assert vllm_omni.attention.capabilities == {"supports_attention_mask": True}
    torch.testing.assert_close(vllm_omni.attention(q, k, v, {"attn_mask": mask}, **kwargs), sdpa(q, k, v, mask))
    blocks = {"block_size": (8, 4)}
    for topk in (6, 9, 0.99):
        torch.testing.assert_close(vllm_omni.attention(q, k, v, blocks | {"topk": topk}, **kwargs), dense)
    index = vk.topk_blocks(q, k, block_size=(8, 4), topk=2)
    expected = vk.cross_attention(q, k, v, block_index=index, block_size=(8, 4))
    for topk in (2, 0.3):
        assert torch.equal(vllm_omni.attention(q, k, v, blocks | {"topk": topk}, **kwargs), expected)
    frames = torch.arange(24) // 6
    near = (frames[:, None] - frames).abs() <= 1
    near[:, :2] = True
    params = {"window": (1, 1), "num_sinks": 2, "patches_per_frame": torch.tensor([6])}
    torch.testing.assert_close(vllm_omni.attention(q, k, v, params, **kwargs), sdpa(q, k, v, near))
    for params, options, message in [
        ({}, {"is_causal": True}, "is_causal must be False"),
        ({"topk": 1.5}, {}, "topk must be a count or a share in (0, 1), got 1.5"),
        ({"window": (1, 1)}, {}, "params must have patches_per_frame if they have window"),
    ]:
        with pytest.raises(ValueError) as raised:
            vllm_omni.attention(q, k, v, params, **options)
        assert str(raised.value).startswith(f"vidmem_kernels.vllm_omni.attention: {message}")


@pytest.mark.parametrize("name", CACHES)
def test_beside_caches_in_either_order(name):
    model = tiny_wan()
    with cache(model, name), attention_backend(model):
        inside = denoise(model)
    with attention_backend(model), cache(model, name):
        outside = denoise(model)
    assert torch.equal(inside, outside)
    with cache(model, name):
        torch.testing.assert_close(inside, denoise(model), rtol=1e-4, atol=1e-5)


def test_checkpointing():
    model = tiny_wan().train()
    inputs, leaves = inputs_of(model, (2, 3, 4)), [*model.parameters()]
    grads = []
    for _ in range(2):
        with attention_backend(model):
            grads.append(torch.autograd.grad(model(**inputs)[0].square().sum(), leaves, allow_unused=True))
        model.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)
