"""Sample inputs of the linear attention ops."""

from .._numerics import accumulate_dtype
from ..testing import public_call, sample_inputs
from . import api


def _cases(make):
    """Yields (label, q, k, v, S, z, feature_map, causal, block_size, normalize, scale)."""

    def qkv(length, heads=2, size=4, value_size=4, batch=2):
        shape = (batch, length, heads, size)
        return make.randn(*shape), make.randn(*shape), make.randn(*shape[:3], value_size)

    def state(heads=2, size=4, value_size=4, batch=2):
        wide = accumulate_dtype(make.dtype)
        shape = (batch, heads, size)
        return make.randn(*shape, value_size, dtype=wide), make.rand(*shape, dtype=wide)

    none = (None, None)
    yield "relu", *qkv(7), *none, "relu", False, 1, True, 1.0
    yield "elu1, state", *qkv(7), *state(), "elu1", False, 1, True, 1.0
    yield "identity, not normalised", *qkv(7), *none, "identity", False, 1, False, 1.0
    yield "relu, causal, state", *qkv(9), *state(), "relu", True, 1, True, 1.0
    yield "elu1, partial block", *qkv(11, size=3, value_size=5), *none, "elu1", True, 4, True, 1.0
    yield "identity, causal, state", *qkv(9), *state(), "identity", True, 3, False, 1.0
    yield "block longer than all", *qkv(5), *none, "elu1", True, 512, True, 1.0
    yield "many chunks", *qkv(300, 1, 2, 2, 1), *none, "elu1", True, 5, True, 1.0
    strided = (make.strided(t) for t in qkv(7, 3))
    yield "strided", *strided, *map(make.strided, state(3)), "elu1", True, 2, True, 1.0
    yield "one channel", *qkv(5, 1, 1, 1), *none, "elu1", True, 1, True, 1.0
    # Not relu: if one small channel of a query is left, its gradient is 0 except for rounding, and so is its budget.
    yield "scale", *qkv(7), *state(), "elu1", False, 1, True, 0.3
    yield "scale, causal, not normalised", *qkv(9), *state(), "elu1", True, 2, False, -0.7
    yield "scale of 0", *qkv(5), *state(), "identity", True, 2, False, 0.0
    yield "no token", *qkv(0), *state(), "relu", True, 2, True, 1.0
    yield "no batch", *qkv(5, batch=0), *none, "relu", False, 1, True, 1.0
    yield "no head", *qkv(5, heads=0), *state(0), "relu", True, 2, True, 1.0
    yield "no channel", *qkv(5, size=0), *state(size=0), "elu1", True, 2, True, 1.0
    yield "no value channel", *qkv(5, value_size=0), *state(value_size=0), "relu", False, 1, True, 0.5


@sample_inputs("linear_attention")
def linear_attention(make):
    for label, *args in _cases(make):
        yield label, tuple(args)


@sample_inputs("linear_attention_backward")
def linear_attention_backward(make):
    for label, q, k, v, *rest in _cases(make):
        wide = accumulate_dtype(make.dtype)
        batch, _, heads, size = q.shape
        grad_S = make.randn(batch, heads, size, v.shape[3], dtype=wide)
        grad_z = make.randn(batch, heads, size, dtype=wide)
        yield label, (make.randn(*v.shape), grad_S, grad_z, q, k, v, *rest)


def _state(m, s):
    sums = accumulate_dtype(m.dtype)
    head = s["B"], s["L"], s["H"]
    q, k, v = m.randn(*head, s["D"]), m.randn(*head, s["D"]), m.randn(*head, s["E"])
    S = m.randn(s["B"], s["H"], s["D"], s["E"], dtype=sums)
    return q, k, v, S, m.rand(s["B"], s["H"], s["D"], dtype=sums)


QKV = ("B L H 4", "B L H 4", "B L H 6")


def attend(feature_map, block):
    """A call of linear_attention, causal in blocks of `block` tokens; 0 means not causal."""
    options = {"feature_map": feature_map, "causal": block > 0, "block_size": block or 1}
    return lambda q, k, v: api.linear_attention(q, k, v, normalize=feature_map != "identity", **options)


for _map in ("relu", "elu1", "identity"):
    public_call("linear_attention", _map, attend(_map, 0), *QKV)
    public_call("linear_attention", f"{_map}, causal in blocks of 4", attend(_map, 4), *QKV)
public_call(
    "linear_attention",
    "state, channels",
    lambda q, k, v, S, z: api.linear_attention(
        q, k, v, causal=True, state=api.LinearAttentionState(S, z), return_state=True
    ),
    *("B L H D", "B L H D", "B L H E", "B H D E", "B H D"),
    make=_state,
    D=1,
    E=1,
)
public_call(
    "linear_attention",
    "normalizer of its own",
    lambda q, k, v, q2, k2: api.linear_attention(
        q, k, v, feature_map="elu1", causal=True, block_size=3, normalizer=(q2, k2), return_state=True
    ),
    *(*QKV, *QKV[:2]),
)
