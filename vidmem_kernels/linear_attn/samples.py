"""Sample inputs of the linear attention ops."""

from .._numerics import accumulate_dtype
from ..testing import sample_inputs


def _cases(make):
    """(label, q, k, v, S, z, feature_map, causal, block_size, normalize, scale)"""

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
    # Not relu: the gradient of a query with one small channel left is 0 but for rounding, a budget without a bound.
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
