"""torch.func, forward-mode gradients and batched gradients of every public function and module.

Each is held to finite differences in float64, and float32 to float64; never is a derivative silently zero.
"""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils import _pytree as pytree

import vidmem_kernels as vk
from vidmem_kernels.testing import Make, is_differentiable, public_calls, public_functions, public_modules

BLOCKS = torch.tensor([[[[0, 2], [1, -1]]]])
STEP = 1e-6


def flat(results):
    """All float results as one vector, what is infinite left out."""
    parts = [t.reshape(-1) for t in pytree.tree_leaves(results) if t.is_floating_point()]
    return torch.cat(parts)


SIZES = {"B": 1, "N": 6, "L": 5, "Lq": 5, "Lk": 6, "M": 6, "C": 4}  # all others 2 or what a call needs at least


def of_floats(call, dtype):
    """A public call as a function of the tensors that get a gradient, and those; of indices alone, times them."""
    given = call.make(Make(dtype), {name: SIZES.get(name, max(2, call.least.get(name, 0))) for name in call.names})
    places = call.floats(given)

    def function(*floats):
        moved = dict(zip(places, floats, strict=True))
        results = call.call(*(moved.get(i, t) for i, t in enumerate(given)))
        found = [t for t in pytree.tree_leaves(results) if is_differentiable(t)]
        return found or [t * sum(index.sum() for index in pytree.tree_leaves(results)) for t in floats]

    return function, tuple(given[i] for i in places)


def cases(dtype=torch.float64):
    """What is differentiated and in what: public calls, modules, and calls of particular kinds."""
    make = Make(dtype)
    r = make.randn
    x, wide = r(2, 6, 3), torch.promote_types(dtype, torch.float32)
    plan = vk.match_tokens(x, 2)
    q, k, v = r(1, 4, 2, 3), r(1, 4, 2, 3), r(1, 4, 2, 2)
    linear = vk.LinearAttention(4, 2, causal=True, block_size=2, dtype=dtype)
    cross = vk.MemoryCrossAttention(4, 2, dtype=dtype)
    torch.nn.init.normal_(cross.gate)
    linear.requires_grad_(False), cross.requires_grad_(False)  # linearize folds constants, in place in torch's RMSNorm
    found = {str(call): of_floats(call, dtype) for call in public_calls()}
    # Merges of a plan that depends on what is differentiated: the derivative holds the plan fixed, as autograd does.
    found |= {
        "select_tokens[score of x]": (lambda x: vk.select_tokens(x, 3, score=x.sum(2)).tokens, (x,)),
        "match_tokens[merged]": (lambda x: vk.merge_tokens(x, vk.match_tokens(x, 2)).tokens, (x,)),
        "match_neighbors[merged]": (
            lambda x: vk.merge_tokens(x, vk.match_neighbors(x, 2, grid=(1, 2, 3))).tokens, (x,)
        ),
        "merge_tokens[matched]": (
            lambda x, size: vk.merge_tokens(x, plan, size),
            (x, make.rand(2, 6, dtype=wide)),
        ),
        "unmerge_tokens[matched]": (lambda y: vk.unmerge_tokens(y, plan), (r(2, 4, 3),)),
        "cross_attention[blocks, bias]": (
            lambda q, k, v, b: vk.cross_attention(q, k, v, block_index=BLOCKS, block_size=(2, 2), key_bias=b),
            (q, r(1, 5, 2, 3), r(1, 5, 2, 2), r(1, 2, 5)),
        ),
        "linear_attention[elu1, state]": (
            lambda q, k, v, S, z: vk.linear_attention(
                q, k, v, feature_map="elu1", state=vk.LinearAttentionState(S, z), return_state=True
            ),
            (q, k, v, r(1, 2, 3, 2, dtype=wide).abs(), r(1, 2, 3, dtype=wide).abs()),
        ),
        "LinearAttention": (lambda x: linear(x), (r(1, 4, 4),)),
        "MemoryCrossAttention": (lambda x, m: cross(x, m), (r(1, 4, 4), r(1, 3, 4))),
    }  # fmt: skip
    for causal in (False, True):
        found[f"linear_attention[identity, normalized{', causal' * causal}]"] = (
            lambda q, k, v, causal=causal: vk.linear_attention(
                q, k, v, feature_map="identity", causal=causal, block_size=2
            ),
            (q, k + 3, v),  # a denominator far from 0
        )
    return {name: case for name, case in found.items() if case[1]}


NAMES = sorted(cases())


@pytest.fixture(autouse=True)
def no_level_is_left():
    """A compilation that fails inside of a level of forward mode leaves it entered, for all that follow."""
    yield
    while forward_ad._current_level >= 0:
        forward_ad.exit_dual_level()


class Case:
    """A function of tensors to one vector, with directions and derivatives by finite differences."""

    def __init__(self, name):
        function, self.args = cases()[name]
        self.f = lambda *args: flat(function(*args))
        self.tangents = tuple(torch.randn_like(t) for t in self.args)
        self.weight = torch.randn_like(self.f(*self.args))
        self.s = lambda *args: (self.f(*args) * self.weight).sum()
        self.argnums = tuple(range(len(self.args)))
        self.stack = [torch.stack([t, t + 0.1, t - 0.2]) for t in self.args]

    def moved(self, sign):
        return [t + sign * STEP * d for t, d in zip(self.args, self.tangents, strict=True)]

    def along(self, function):
        """Derivative of `function` along the tangents, by central differences."""
        up, down = (pytree.tree_leaves(function(*self.moved(sign))) for sign in (1, -1))
        return [(a - b) / (2 * STEP) for a, b in zip(up, down, strict=True)]

    def loop(self, function):
        """`function` for each element of the stack."""
        each = [pytree.tree_leaves(function(*[t[i] for t in self.stack])) for i in range(3)]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    def grads(self, *args):
        return grad(self.s, self.argnums)(*args)

    def dot(self, tensors):
        return sum((a * d).sum() for a, d in zip(tensors, self.tangents, strict=True))


def check_jvp(c):
    return jvp(c.f, c.args, c.tangents)[1], c.along(c.f)


def check_forward_ad(c):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(c.args, c.tangents, strict=True)]
        return forward_ad.unpack_dual(c.f(*duals)).tangent, c.along(c.f)


def check_linearize(c):
    return linearize(c.f, *c.args)[1](*c.tangents), c.along(c.f)


def check_grad(c):
    return c.dot(c.grads(*c.args)), c.along(c.s)


def check_vjp(c):
    return c.dot(vjp(c.f, *c.args)[1](c.weight)), c.along(c.s)


def check_jacrev(c):
    return jacrev(c.f, c.argnums)(*c.args), torch.autograd.functional.jacobian(c.f, c.args)


def check_jacfwd(c):
    return jacfwd(c.f, c.argnums)(*c.args), torch.autograd.functional.jacobian(c.f, c.args)


def check_hessian(c):
    rows = hessian(c.s, c.argnums)(*c.args)
    found = [
        sum(
            (block.reshape(*t.shape, -1) @ d.reshape(-1))
            for block, d in zip(row, c.tangents, strict=True)
        )
        for row, t in zip(rows, c.args, strict=True)
    ]  # fmt: skip
    return found, c.along(c.grads)


def check_jvp_of_grad(c):
    return jvp(c.grads, c.args, c.tangents)[1], c.along(c.grads)


def check_grad_of_jvp(c):
    return grad(lambda *args: jvp(c.s, args, c.tangents)[1], c.argnums)(*c.args), c.along(c.grads)


def check_vmap(c):
    return vmap(c.f)(*c.stack), c.loop(c.f)


def check_vmap_of_one(c):
    rest = c.args[1:]
    found = vmap(c.f, in_dims=(1, *[None] * len(rest)))(c.stack[0].transpose(0, 1), *rest)
    return found, torch.stack([c.f(t, *rest) for t in c.stack[0]])


def check_vmap_of_vmap(c):
    twice = [torch.stack([t, t + 0.3]) for t in c.stack]
    return vmap(vmap(c.f))(*twice)[0], c.loop(c.f)


def check_vmap_of_grad(c):
    return vmap(c.grads)(*c.stack), c.loop(c.grads)


def check_grad_of_vmap(c):
    return grad(lambda *args: vmap(c.s)(*args).sum(), c.argnums)(*c.stack), c.loop(c.grads)


def check_vmap_of_jvp(c):
    def push(*args):
        return jvp(c.f, args, c.tangents)[1]

    return vmap(push)(*c.stack), c.loop(push)


def check_jvp_of_vmap(c):
    many = tuple(torch.stack([d] * 3) for d in c.tangents)
    return jvp(vmap(c.f), tuple(c.stack), many)[1], c.loop(lambda *args: jvp(c.f, args, c.tangents)[1])


def check_backward_of_vmap(c):
    leaves = [t.clone().requires_grad_() for t in c.stack]
    return torch.autograd.grad(vmap(c.s)(*leaves).sum(), leaves), c.loop(c.grads)


def check_batched_gradients(c):
    leaves = [t.clone().requires_grad_() for t in c.args]
    many = torch.stack([c.weight, c.weight * 2, c.weight + 1])
    found = torch.autograd.grad(c.f(*leaves), leaves, many, is_grads_batched=True)
    each = [torch.autograd.grad(c.f(*leaves), leaves, w) for w in many]
    return found, [torch.stack(parts) for parts in zip(*each, strict=True)]


def check_vectorized_jacobian(c):
    jacobian = torch.autograd.functional.jacobian
    return jacobian(c.f, c.args, vectorize=True), jacobian(c.f, c.args)


def check_forward_mode_jacobian(c):
    jacobian = torch.autograd.functional.jacobian
    return jacobian(c.f, c.args, vectorize=True, strategy="forward-mode"), jacobian(c.f, c.args)


def compiled(function, *args):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*args)


def check_compiled_grad(c):
    return compiled(lambda *args: c.grads(*args), *c.args), c.grads(*c.args)


def check_compiled_jvp(c):
    return compiled(lambda *args: jvp(c.f, args, c.tangents)[1], *c.args), c.along(c.f)


def check_compiled_vmap(c):
    return compiled(lambda *args: vmap(c.f)(*args), *c.stack), c.loop(c.f)


def check_compiled_vmap_of_grad(c):
    return compiled(lambda *args: vmap(c.grads)(*args), *c.stack), c.loop(c.grads)


def check_compiled_jacfwd(c):
    return compiled(lambda *args: jacfwd(c.f, c.argnums)(*args), *c.args), jacrev(c.f, c.argnums)(*c.args)


def check_compiled_forward_ad(c):
    def inside(*args):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(args, c.tangents, strict=True)]
            return forward_ad.unpack_dual(c.f(*duals)).tangent

    return compiled(inside, *c.args), c.along(c.f)


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def assert_close(found, expected):
    found, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.sample(120)
@pytest.mark.parametrize("check", sorted(CHECKS))
@pytest.mark.parametrize("name", NAMES)
def test_against_finite_differences(name, check):
    assert_close(*CHECKS[check](Case(name)))


def test_every_declared_function_is_there():
    declared = public_functions() & {call.function for call in public_calls()}
    assert {name.split("[")[0] for name in NAMES} == declared | public_modules()


@pytest.mark.parametrize("name", NAMES)
def test_float32_against_float64(name):
    """The tangent in float32 is that of float64 but for rounding."""
    torch.manual_seed(0)
    function, args = cases(torch.float32)[name]
    torch.manual_seed(0)
    exact_function, exact_args = cases()[name]
    tangents = tuple(torch.randn_like(t) for t in args)
    _, found = jvp(lambda *a: flat(function(*a)), args, tangents)
    exact_args = tuple(t.double() for t in args)
    if name[0].isupper():  # a module has weights of its own dtype
        return
    _, exact = jvp(lambda *a: flat(exact_function(*a)), exact_args, tuple(t.double() for t in tangents))
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_the_op_s_own(name):
    """Under a transform the results have the dtypes that autocast gives them without."""
    function, args = cases(torch.float32)[name]
    with torch.autocast("cpu", torch.bfloat16):
        plain = [t.dtype for t in pytree.tree_leaves(function(*args)) if t.is_floating_point()]
        out, tangent = jvp(lambda *a: [t for t in pytree.tree_leaves(function(*a)) if t.is_floating_point()],
                           args, tuple(torch.ones_like(t) for t in args))  # fmt: skip
    assert [t.dtype for t in out] == plain == [t.dtype for t in tangent]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_function_in_and_out_of_transforms(compiler):
    """One compiled function, called plainly and under each transform in turn."""
    x, t = torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    index = torch.tensor([[0, 2]])

    def f(x):
        return vk.gather_tokens(x, index)

    torch._dynamo.reset()
    g = torch.compile(f, backend=compiler)

    def forward(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent

    uses = [
        lambda f: f(x),
        lambda f: grad(lambda x: f(x).sin().sum())(x),
        lambda f: jvp(f, (x,), (t,))[1],
        lambda f: vmap(f)(torch.stack([x, t])),
        forward,
        lambda f: jacfwd(f)(x),
    ]
    for use in (*uses, uses[0], *reversed(uses)):
        torch.testing.assert_close(use(g), use(f))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_function_with_tangents_of_outside(compiler):
    """Whole graphs give the tangent or refuse; never nothing."""
    x, t, index = torch.randn(1, 6, 4), torch.randn(1, 6, 4), torch.tensor([[0, 2]])
    torch._dynamo.reset()
    g = torch.compile(lambda x: vk.gather_tokens(x, index), backend=compiler, fullgraph=True)
    g(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        if compiler == "inductor":  # which drops tangents, of every op of torch
            with pytest.raises(Exception, match="disable"):
                g(dual)
        else:
            assert torch.equal(forward_ad.unpack_dual(g(dual)).tangent, t[:, [0, 2]])
    assert torch.equal(g(x), x[:, [0, 2]])


def test_raw_ops_refuse_tangents():
    """torch.ops.vidmem.* raise where a derivative would be lost, at any nesting, and only there."""
    x, index = torch.randn(1, 6, 4), torch.tensor([[0, 2]])
    q, lse = torch.randn(1, 4, 2, 3), torch.randn(1, 2, 4)

    def raw(x):
        return torch.ops.vidmem.gather_tokens(x, index)

    def states(q):
        return torch.ops.vidmem.merge_attention_states([q, q], [lse, lse], backend="auto")[0]

    def forward():
        with forward_ad.dual_level():
            raw(forward_ad.make_dual(x, x))

    refused = [
        lambda: jvp(raw, (x,), (x,)),
        lambda: grad(lambda x: raw(x).sum())(x),
        lambda: vmap(lambda x: jvp(raw, (x,), (x,))[1])(torch.stack([x, x])),
        lambda: jvp(vmap(raw), (torch.stack([x, x]),) * 1, (torch.stack([x, x]),)),
        lambda: jvp(states, (q,), (q,)),
        forward,
    ]
    for call in refused:
        with pytest.raises(RuntimeError, match="has no derivative under torch.func or in forward mode"):
            call()
    constant = raw(torch.ones(1, 6, 4))
    out, tangent = jvp(lambda x: raw(torch.ones(1, 6, 4)) * x.sum(), (x,), (x,))
    assert torch.equal(tangent, constant * x.sum())


@pytest.mark.parametrize("name", NAMES)
def test_explicit_backend_raises(name, monkeypatch):
    """Whoever asks for a kernel by name is told that it has no such derivative; the reference is served."""
    function, args = cases()[name]
    tangents = tuple(torch.ones_like(t) for t in args)
    with vk.use_backend("cpu"), pytest.raises(vk.BackendError, match="has no derivative under torch.func"):
        jvp(lambda *a: flat(function(*a)), args, tangents)
    with vk.use_backend("reference"):
        by_name = jvp(lambda *a: flat(function(*a)), args, tangents)[1]
    assert torch.equal(by_name, jvp(lambda *a: flat(function(*a)), args, tangents)[1])
    monkeypatch.setenv("VIDMEM_BACKEND", "cpu")
    with pytest.raises(vk.BackendError, match="has no derivative under torch.func"):
        grad(lambda *a: flat(function(*a)).sum())(*args)


def test_vmap_keeps_the_kernel(monkeypatch):
    """vmap alone takes the backend that is asked for, and calls it once."""
    seen = []
    from vidmem_kernels import _dispatch

    implementation = _dispatch.implementation
    monkeypatch.setattr(_dispatch, "implementation", lambda *a: (seen.append(a[1]), implementation(*a))[1])
    x = torch.randn(5, 1, 6, 4)
    vmap(lambda x: vk.gather_tokens(x, torch.tensor([[0, 2]]), backend="reference"))(x)
    assert seen == ["reference"]


def in_threes(call):
    """A public call as a function of what is mapped alone, and three of each along the first axis.

    Indices are one argument: those of a plan make no sense beside those of another.
    """
    sizes = {
        name: {"B": 2, "N": 6, "L": 6, "Lq": 6, "Lk": 9, "C": 4}.get(name, max(3, call.least.get(name, 0)))
        for name in call.names
    }
    drawn = [torch.stack(each) for each in zip(*(call.make(Make(seed=i), sizes) for i in range(3)), strict=True)]
    alone = [[i] for i, t in enumerate(drawn) if t.is_floating_point()]
    indices = [i for i, t in enumerate(drawn) if not t.is_floating_point()]
    parts = alone + [indices] * bool(indices)

    def function(*values):
        given = {i: t for part, group in zip(parts, values, strict=True) for i, t in zip(part, group, strict=True)}
        return call.call(*(given[i] for i in range(len(drawn))))

    return function, [[drawn[i] for i in part] for part in parts]


def mappable():
    """Calls with all their tensors as arguments, three of each along the first axis."""
    r, times = torch.randn, torch.rand(3, 6) * 5
    q = r(3, 2, 6, 2, 8)

    def window(q, k, a, b):
        return vk.cross_attention(q, k, k, q_time=a, k_time=b, window=(1, 1), num_sinks=1, return_lse=True)

    def blocks(q, b, i):
        return vk.cross_attention(q, q, q, key_bias=b, block_index=i, block_size=(2, 2))

    def state(q, k, S, z):
        return vk.linear_attention(q, k, q, state=vk.LinearAttentionState(S, z), return_state=True, scale=0.5)

    return {str(call): in_threes(call) for call in public_calls()} | {
        "linear_attention[state, scale]": (state, [q, q + 1, torch.rand(3, 2, 2, 8, 8), torch.rand(3, 2, 2, 8)]),
        "cross_attention[times]": (window, [q, q + 1, times, times.flip(1)]),
        "cross_attention[times of a batch]": (window, [q, q + 1, times[:, None].expand(3, 2, 6), times]),
        "cross_attention[blocks, bias]": (blocks, [q, r(3, 2, 6), torch.randint(-1, 3, (3, 2, 1, 3, 2))]),
    }


@pytest.mark.parametrize("name", sorted(mappable()))
def test_vmap_of_some_arguments(name):
    """vmap over any of the arguments is a loop over them."""
    call, tensors = mappable()[name]
    for which in range(1, 2 ** len(tensors)):
        dims = tuple(0 if which >> i & 1 else None for i in range(len(tensors)))

        def take(i, dims=dims):
            places = [i if dim == 0 else 0 for dim in dims]
            return [pytree.tree_map(lambda u, p=p: u[p], t) for t, p in zip(tensors, places, strict=True)]

        args = [t if dim == 0 else shared for t, dim, shared in zip(tensors, dims, take(0), strict=True)]
        found = pytree.tree_leaves(vmap(call, in_dims=dims)(*args))
        for i, part in enumerate(zip(*[pytree.tree_leaves(call(*take(i))) for i in range(3)], strict=True)):
            torch.testing.assert_close(found[i], torch.stack(part), equal_nan=True)


def test_size_that_depends_on_values():
    x = torch.randn(2, 1, 6, 4)
    with pytest.raises(RuntimeError, match="match_neighbors: the number of rows depends on the values"):
        vmap(lambda x: vk.match_neighbors(x, None, grid=(1, 2, 3), threshold=0.1).kept)(x)


def test_index_errors_come_through():
    x, index = torch.randn(2, 1, 6, 4), torch.tensor([[9]])

    def f(x):
        return vk.gather_tokens(x, index).sum()

    for call in (lambda: grad(f)(x[0]), lambda: vmap(grad(f))(x), lambda: vmap(f)(x), lambda: jvp(f, (x[0],), (x[0],))):
        with pytest.raises(IndexError, match="index must be in"):
            call()


def test_explain_under_a_transform():
    q = torch.randn(1, 4, 2, 8)
    (choice,) = vk.explain(lambda q: jvp(lambda q: vk.cross_attention(q, q, q), (q,), (q,))[1], q)
    assert choice.backend == "reference" and "has no derivative" in choice.refused["cpu"]
