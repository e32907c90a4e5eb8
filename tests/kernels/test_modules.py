"""LinearAttention and MemoryCrossAttention: values against plain torch, training, checkpoints, streaming, autocast."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from gradient_helpers import same_gradients
from torch import nn

import vidmem_kernels as vk
from vidmem_kernels import LinearAttention, MemoryCrossAttention, _dispatch, apply_rotary, rotary, testing
from vidmem_kernels._op import OPS

INF = math.inf
NORMS = (None, "rms_norm", "rms_norm_across_heads")


def backends(op):
    """What runs this op on CPU tensors, by name; the interpreter is for the contract tests."""
    return [b for b in ("cpu", "library", "reference") if _dispatch.unavailable(OPS[op], b, "cpu") is None]


def memory_attention(gate=0.5, dtype=torch.float32, **options):
    module = MemoryCrossAttention(24, 3, **{"memory_dim": 20, "dtype": dtype, **options})
    for norm in filter(None, (module.norm_q, module.norm_k)):
        nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(module.gate, 0.0, gate)
    return module


def tokens(length=11, memory=17, dtype=torch.float32):
    return torch.randn(2, length, 24).to(dtype), torch.randn(2, memory, 20).to(dtype)


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def plain_memory_attention(module, x, memory, mask=0.0):
    """By SDPA, with everything that is visible in one dense mask."""
    q, k, v = module.q(x), module.k(memory), module.v(memory)
    if module.qk_norm == "rms_norm_across_heads":
        q, k = rms(q, module.norm_q.weight), rms(k, module.norm_k.weight)
    q, k, v = (t.unflatten(2, (3, -1)).transpose(1, 2) for t in (q, k, v))
    if module.qk_norm == "rms_norm":
        q, k = rms(q, module.norm_q.weight), rms(k, module.norm_k.weight)
    mask = torch.as_tensor(mask, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return x + torch.tanh(module.gate) * (out @ module.o.weight.T)


def plain_linear_attention(module, x):
    """Weights of every pair of tokens, written out."""
    q, k, v = (p(x).unflatten(2, (module.num_heads, -1)).transpose(1, 2) for p in (module.q, module.k, module.v))
    phi = {"relu": F.relu, "elu1": lambda t: F.elu(t) + 1, "identity": lambda t: t}[module.feature_map]
    weight = phi(q) @ phi(k).mT
    if module.causal:
        block = torch.arange(x.shape[1]) // module.block_size
        weight = weight * (block[:, None] >= block)
    if module.normalize:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-10)
    return module.o((weight @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("feature_map, causal, block_size, normalize", [
    ("relu", False, 1, True), ("elu1", True, 1, True), ("elu1", True, 4, True), ("identity", True, 3, False),
])  # fmt: skip
def test_linear_attention_is_what_it_says(feature_map, causal, block_size, normalize):
    options = {"feature_map": feature_map, "causal": causal, "block_size": block_size, "normalize": normalize}
    for sizes in ({}, {"head_dim": 5, "value_head_dim": 7, "qkv_bias": False, "out_bias": False}):
        module = LinearAttention(24, 3, dtype=torch.float64, **options, **sizes)
        x = torch.randn(2, 10, 24, dtype=torch.float64, requires_grad=True)
        same_gradients(module, module(x), plain_linear_attention(module, x), x)
    assert [n for n, _ in module.named_parameters()] == ["q.weight", "k.weight", "v.weight", "o.weight"]
    assert module.q.weight.shape == (15, 24) and module.o.weight.shape == (24, 21)


@pytest.mark.parametrize("block_size, cuts", [(1, (3, 4)), (4, (4, 12)), (4, (8,))])
def test_linear_attention_streams(block_size, cuts):
    """Segments that end on block boundaries, with the state carried on: outputs and gradients of one call."""
    module = LinearAttention(24, 3, feature_map="elu1", causal=True, block_size=block_size, dtype=torch.float64)
    x = torch.randn(2, 18, 24, dtype=torch.float64, requires_grad=True)
    whole, end = module(x, return_state=True)
    state, parts = None, []
    for part in x.tensor_split(cuts, 1):
        out, state = module(part, state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(tuple(state), tuple(end))
    assert isinstance(state, vk.LinearAttentionState)
    same_gradients(module, torch.cat(parts, 1), whole, x)
    torch.testing.assert_close(module(x[:, 16:], state=module(x[:, :16], return_state=True)[1]), whole[:, 16:])


@pytest.mark.parametrize("qk_norm", NORMS)
def test_memory_attention_is_what_it_says(qk_norm):
    module = memory_attention(qk_norm=qk_norm, dtype=torch.float64)
    x, memory = (t.requires_grad_() for t in tokens(dtype=torch.float64))
    same_gradients(module, module(x, memory), plain_memory_attention(module, x, memory), x, memory)
    module = memory_attention(qk_norm=qk_norm, head_dim=5, qkv_bias=False, dtype=torch.float64)
    same_gradients(module, module(x, memory), plain_memory_attention(module, x, memory), x, memory)


def test_memory_attention_passes_its_options_on():
    """Merged sizes, a window with sinks, blocks: the same as a dense mask."""
    module = memory_attention(dtype=torch.float64)
    x, memory = tokens(dtype=torch.float64)
    size = torch.randint(1, 9, (2, 17)).double()
    expected = plain_memory_attention(module, x, memory, size.log()[:, None, None])
    torch.testing.assert_close(module(x, memory, key_bias=size.log()), expected)

    at, key_at = torch.arange(11.0), torch.arange(17.0)
    seen = (key_at >= at[:, None] - 2) & (key_at <= at[:, None] + 1)
    options = {"q_time": at, "k_time": key_at, "window": (2, 1)}
    expected = plain_memory_attention(module, x, memory, torch.zeros(11, 17).masked_fill(~seen, -INF))
    torch.testing.assert_close(module(x, memory, **options), expected)
    seen[:, :3] = True
    expected = plain_memory_attention(module, x, memory, torch.zeros(11, 17).masked_fill(~seen, -INF))
    torch.testing.assert_close(module(x, memory, num_sinks=3, **options), expected)

    index = torch.tensor([0, 2, 1]).view(1, 1, 3, 1).expand(2, 3, 3, 1)  # queries 4 at a time, keys 6 at a time
    seen = torch.arange(17) // 6 == index[0, 0, :, 0][torch.arange(11) // 4][:, None]
    expected = plain_memory_attention(module, x, memory, torch.zeros(11, 17).masked_fill(~seen, -INF))
    torch.testing.assert_close(module(x, memory, block_index=index, block_size=(4, 6)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("qk_norm", NORMS)
def test_a_new_memory_changes_nothing(qk_norm, dtype):
    """To the bit, whatever the memory holds, also under autocast and without any memory."""
    module = MemoryCrossAttention(24, 3, memory_dim=20, qk_norm=qk_norm, dtype=dtype)
    x, memory = tokens(dtype=dtype)
    assert torch.equal(module(x, memory * 100), x)
    assert torch.equal(module(x, memory[:, :0]), x)
    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(x, memory), x)


def test_read_is_the_addition_alone_and_one_memory_serves_a_batch():
    module = memory_attention()
    x, memory = tokens()
    bias = torch.randn(1, 3, 17)
    assert torch.equal(module(x, memory, key_bias=bias), x + module.read(x, memory, key_bias=bias))
    one = memory[:1].requires_grad_()
    same_gradients(
        module, module.read(x, one, key_bias=bias),
        module.read(x, one.expand(2, -1, -1), key_bias=bias.expand(2, -1, -1)), one,
    )  # fmt: skip


def test_positions_turn_queries_and_keys():
    module = memory_attention(qk_norm="rms_norm")
    x, memory = tokens()
    here, there = torch.randn(11, 3) * 9, torch.randn(1, 17, 3) * 9
    axes = 4, 2, 2

    def read(shift=0.0):
        turned = {"q_rotary": rotary(here + shift, axes), "k_rotary": rotary(there + shift, axes)}
        return module.read(x, memory, **turned)

    q, k = module._heads(module.q(x), module.norm_q), module._heads(module.k(memory), module.norm_k)
    q, k = apply_rotary(q, rotary(here, axes)), apply_rotary(k, rotary(there, axes))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, module._heads(module.v(memory)))))
    expected = torch.tanh(module.gate) * module.o(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(read(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read(5.0), expected, rtol=1e-4, atol=1e-5)  # what counts is where they are to each other
    assert not torch.allclose(module.read(x, memory), expected, atol=1e-3)
    with pytest.raises(ValueError, match="q_rotary and k_rotary must be given together, got k_rotary"):
        module.read(x, memory, k_rotary=rotary(there, axes))


def test_an_empty_memory_adds_nothing_after_training_either():
    module = memory_attention()
    x, memory = tokens()
    assert not torch.equal(module(x, memory), x)
    assert torch.equal(module(x, memory[:, :0]), x)
    hidden = module(x, memory, key_bias=torch.full((2, 17), -INF))
    assert torch.equal(hidden, x)


def test_gradients_of_the_gate_open_all_others():
    """At the start only the gate (and x) has a gradient; after one step everything has."""
    module = memory_attention(gate=0.0)
    x, memory = tokens()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    target = torch.randn_like(x)
    F.mse_loss(module(x, memory), target).backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad != 0).all() if name == "gate" else (parameter.grad == 0).all(), name
    optimizer.step()
    optimizer.zero_grad()
    F.mse_loss(module(x, memory), target).backward()
    for name, parameter in module.named_parameters():
        # k.bias too: without the norm of keys it would add the same to all scores of a query, which softmax ignores.
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_reads_the_memory(dtype):
    """Tokens must be copied from the memory by their key: the loss falls to a small part."""
    torch.manual_seed(1)
    model = nn.ModuleList([
        LinearAttention(24, 3, feature_map="elu1", causal=True, block_size=4, dtype=dtype),
        MemoryCrossAttention(24, 3, memory_dim=20, dtype=dtype),
    ])  # fmt: skip
    memory = torch.randn(4, 6, 20).to(dtype)
    chosen = torch.randint(0, 6, (4, 12))
    batch = torch.arange(4)[:, None]
    keys, values = torch.randn(20, 24).to(dtype) / 4, torch.randn(20, 24).to(dtype) / 4
    x, target = memory[batch, chosen] @ keys, memory[batch, chosen] @ values
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(120):
        y = x + model[0](x)
        loss = F.mse_loss(model[1](y, memory).float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0], losses[::20]


@pytest.mark.parametrize("name", ["linear_attention", "cross_attention"])
def test_checkpoints_travel_between_backends(name, tmp_path):
    """Saved under one backend, loaded under every other with strict=True: the same outputs, within the budget."""
    x, memory = tokens()

    def build(backend, dtype=torch.float32):
        if name == "linear_attention":
            return LinearAttention(24, 3, feature_map="elu1", causal=True, block_size=4, backend=backend, dtype=dtype)
        return MemoryCrossAttention(24, 3, memory_dim=20, backend=backend, dtype=dtype)

    def run(module, dtype=torch.float32):
        inputs = (x,) if name == "linear_attention" else (x, memory)
        return module(*(t.to(dtype) for t in inputs))

    there_are = backends(name)
    for saved in there_are:
        module = build(saved)
        if name == "cross_attention":
            nn.init.normal_(module.gate)
        path = tmp_path / f"{saved}.pt"
        torch.save(module.state_dict(), path)
        weights = torch.load(path)
        assert list(module.named_buffers()) == []
        exact = build("reference", torch.float64)
        exact.load_state_dict(weights, strict=True)
        at_dtype = build("reference")
        at_dtype.load_state_dict(weights, strict=True)
        for loaded in there_are:
            other = build(loaded)
            other.load_state_dict(weights, strict=True)
            with vk.recording() as choices:
                got = run(other)
            assert [c.backend for c in choices] == [loaded]
            testing.assert_within_budget(got, run(at_dtype), run(exact, torch.float64), f"{saved} to {loaded}")


def test_backend_is_an_argument_or_the_context():
    x, memory = tokens()
    for module, args in ((LinearAttention(24, 3), (x,)), (memory_attention(), (x, memory))):
        with vk.use_backend("reference"), vk.recording() as choices:
            module(*args)
        module.backend = "triton" if torch.cuda.is_available() else "cuda"
        assert [c.backend for c in choices] == ["reference"]
        with pytest.raises(vk.BackendError):
            module(*args)


@pytest.mark.parametrize("qk_norm", NORMS)
def test_autocast(qk_norm, recwarn):
    """float32 parameters under bfloat16 autocast: near float32, the residual and its dtype untouched."""
    x, memory = tokens()
    module = memory_attention(qk_norm=qk_norm)
    expected = module(x, memory) - x
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(given, memory)
        assert out.dtype == given.dtype
        change = out.float() - given.float()
        assert (change - expected).abs().max() < 0.05 * expected.abs().max() + 2**-8 * out.abs().max()
        out.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    linear = LinearAttention(24, 3, feature_map="elu1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = linear(x, return_state=True)
    assert out.dtype == torch.bfloat16 and state.S.dtype == torch.float32
    expected = linear(x)
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()
    assert not recwarn.list, [str(w.message) for w in recwarn.list]


def test_compiles_whole():
    """No graph break with state, bias and window, at several lengths; values and gradients as without."""
    linear = LinearAttention(24, 3, causal=True, block_size=4)
    cross = memory_attention()

    def call(x, memory, state, bias):
        y, state = linear(x, state, return_state=True)
        times = torch.arange(x.shape[1]), torch.arange(memory.shape[1])
        out = cross(x + y, memory, key_bias=bias, q_time=times[0], k_time=times[1], window=(5, INF), num_sinks=1)
        return cross(out, memory), state

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        _, state = linear(torch.randn(2, 8, 24), return_state=True)
    parameters = [*linear.parameters(), *cross.parameters()]
    for length, keys in ((8, 9), (13, 21)):
        x, memory = tokens(length, keys)
        bias = torch.rand(2, keys)
        got, expected = compiled(x, memory, state, bias), call(x, memory, state, bias)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got[0].square().sum(), parameters),
            torch.autograd.grad(expected[0].square().sum(), parameters),
        )


def test_copies_and_meta_device():
    x, memory = tokens()
    module = memory_attention()
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x, memory), module(x, memory))
    with torch.no_grad():
        twin.o.weight.zero_()
    assert torch.equal(twin(x, memory), x) and not torch.equal(module(x, memory), x)

    with torch.device("meta"):
        empty = MemoryCrossAttention(24, 3, memory_dim=20)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty(x.to("meta"), memory.to("meta")).shape == x.shape
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(x, memory), module(x, memory))
    blank = MemoryCrossAttention(24, 3, memory_dim=20, device="meta").to_empty(device="cpu")
    for part in blank.modules():
        part.reset_parameters()
    assert torch.equal(blank(x, memory), x)
    linear = LinearAttention(24, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in linear.parameters()} == {("meta", torch.bfloat16)}
    out, state = linear(torch.empty(2, 5, 24, device="meta", dtype=torch.bfloat16), return_state=True)
    assert out.shape == (2, 5, 24) and state.S.shape == (2, 3, 8, 8) and state.S.dtype == torch.float32


def test_repr_tells_the_options():
    module = LinearAttention(24, 3, causal=True, block_size=5, backend="reference")
    head = "dim=24, num_heads=3, feature_map='relu', causal=True, block_size=5, normalize=True, backend='reference'"
    assert head in repr(module)
    assert "dim=24, num_heads=3, memory_dim=20, qk_norm='rms_norm', backend=None" in repr(memory_attention())


@pytest.mark.parametrize("kind, args, options, error, message", [
    (LinearAttention, (512, 7), {}, ValueError, "num_heads must divide dim 512, got 7"),
    (LinearAttention, (512, 7), {"head_dim": 64}, ValueError, "num_heads must divide dim 512, got 7"),
    (LinearAttention, (512, 0), {}, ValueError, "num_heads must be at least 1, got 0"),
    (LinearAttention, (512.0, 8), {}, TypeError, "dim must be an int, got float"),
    (LinearAttention, (512, 8), {"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
    (LinearAttention, (512, 8), {"value_head_dim": "4"}, TypeError, "value_head_dim must be an int, got str"),
    (LinearAttention, (512, 8), {"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    (LinearAttention, (512, 8), {"feature_map": "elu"}, ValueError,
     "feature_map must be one of relu, elu1, identity, got 'elu'"),
    (LinearAttention, (512, 8), {"backend": "tritn"}, ValueError,
     "backend must be one of auto, cpu, triton, cuda, library, reference, got 'tritn' (did you mean 'triton'?)"),
    (MemoryCrossAttention, (512, 7), {}, ValueError, "num_heads must divide dim 512, got 7"),
    (MemoryCrossAttention, (512, None), {}, TypeError, "num_heads must be an int, got NoneType"),
    (MemoryCrossAttention, (512, 8), {"memory_dim": 0}, ValueError, "memory_dim must be at least 1, got 0"),
    (MemoryCrossAttention, (512, 8), {"qk_norm": "layer"}, ValueError,
     "qk_norm must be one of None, rms_norm, rms_norm_across_heads, got 'layer'"),
    (MemoryCrossAttention, (512, 8), {"backend": "gpu"}, ValueError, "backend must be one of auto, cpu"),
])  # fmt: skip
def test_bad_options(kind, args, options, error, message):
    with pytest.raises(error) as raised:
        kind(*args, **options)
    assert str(raised.value).startswith(f"{kind.__name__}: {message}")


def test_bad_inputs():
    x, memory = tokens()
    linear, cross = LinearAttention(24, 3), memory_attention()
    cases = [
        (linear, (x[0],), {}, ValueError, "LinearAttention: x must have shape (B, L, 24), got (11, 24)"),
        (linear, (memory,), {}, ValueError, "LinearAttention: x must have shape (B, L, 24), got (2, 17, 20)"),
        (linear, (None,), {}, TypeError, "LinearAttention: x must be a tensor, got NoneType"),
        (linear, (x, x), {}, TypeError, "linear_attention: state must be a LinearAttentionState (S, z), got Tensor"),
        (cross, (x, x), {}, ValueError, "MemoryCrossAttention: memory must have shape (B, M, 20), got (2, 11, 24)"),
        (cross, (x, memory.long()), {}, TypeError, "MemoryCrossAttention: memory must be float32, bfloat16,"),
        (cross, (x, memory.bfloat16()), {}, ValueError,
         "MemoryCrossAttention: x and memory must have the same dtype, got torch.float32 and torch.bfloat16"),
        (cross, (x[:1], memory), {}, ValueError,
         "MemoryCrossAttention: memory must have batch 1 or that of x, 1, got 2"),
        (cross, (x, memory[:1]), {"key_bias": torch.zeros(3, 17)}, ValueError, "cross_attention: key_bias must have"),
        (cross, (x, memory), {"window": (1, 1)}, ValueError, "cross_attention: q_time, k_time and window must be"),
        (cross, (x, memory), {"key_bias": torch.zeros(2, 16)}, ValueError, "cross_attention: key_bias must have"),
    ]  # fmt: skip
    for module, args, options, error, message in cases:
        with pytest.raises(error) as raised:
            module(*args, **options)
        assert str(raised.value).startswith(message), str(raised.value)
