"""A key bias as channels of libraries that know none: the arithmetic around the library's call, and when it is done."""

import pytest
import torch
from library_helpers import (
    MODULES,
    chosen,
    chosen_gradient,
    flash_attn_4_gradients,
    flash_attn_functions,
)

from vidmem_kernels import testing
from vidmem_kernels._op import OPS
from vidmem_kernels.cross_attn import library, library_bias
from vidmem_kernels.cross_attn.samples import PLAIN

INF = torch.inf
HALF = [torch.bfloat16, torch.float16]
LARGE = {"queries": 32_760, "keys": 5_120, "heads": 24, "biased": True}
FORWARD = {one.name: one for one in library.FORWARD}
BACKWARD = {one.name: one for one in library.BACKWARD}


@pytest.fixture
def packages(machine):
    def install(*names, capability=(9, 0)):
        modules = {MODULES[name]: flash_attn_functions([], name) for name in names}
        if "FA4" in names:
            modules["flash_attn.cute.interface"] = flash_attn_4_gradients([])
        machine(capability, modules=modules)

    return install


def draw(name, dtype, seed):
    """(q, k, v, bias, scale): odd lengths, a bias of the batch or of heads, whatever `name` says of it."""
    make = testing.Make(dtype, seed=seed)
    size = (64, 128)[seed % 2]
    q, k, v = make.randn(2, 43, 3, size), make.randn(2, 77, 3, size), make.randn(2, 77, 3, size)
    scale = size**-0.5
    shape = (2, 77) if seed % 3 else (2, 3, 77)
    bias = make.randn(*shape, dtype=torch.float32)
    if name == "merged sizes":
        bias = make.randint(1, 9, shape).float().log()
    elif name == "hidden keys":
        bias[..., ::5] = -INF
        k[0, 5, 1], v[:, ::5] = INF, torch.nan  # nobody sees it
        k[:, 10] = torch.nan
    elif name == "nothing to see":
        bias[0] = -INF
    elif name == "a head sees nothing":
        bias = make.randn(2, 3, 77, dtype=torch.float32)
        bias[1, 2] = -INF
    elif name == "large":
        bias = make.randint(-1, 2, shape).float() * 1e4
    elif name == "all far below":
        bias -= 1e4
    elif name == "lowest number":
        bias[..., 1::2] = torch.finfo(torch.float32).min
    elif name == "narrow scale":
        scale = 2.0**-9
    elif name == "wide scale":
        q, scale = q / 64, 8.0
    elif name == "bias of half precision":
        bias = bias.to(dtype)
    elif name == "bias of float64":
        bias = bias.double()
    return q, k, v, bias, scale


NAMES = [
    "normal", "merged sizes", "hidden keys", "nothing to see", "a head sees nothing", "large", "all far below",
    "lowest number", "narrow scale", "wide scale", "bias of half precision", "bias of float64",
]  # fmt: skip


def arguments(q, k, v, bias, scale):
    options = {**PLAIN, "scale": scale}
    del options["key_bias"]
    return q, k, v, bias, *options.values()


def strided(name, x):
    """Values and keys of any strides, as a cache may have them."""
    return testing.Make().strided(x) if name == "merged sizes" else x


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_results(packages, name, dtype):
    """Within the budget of attention in half precision, lse within that of float32."""
    packages("FA3", "fa3-fwd", "FA4")
    for seed in range(3):
        q, k, v, bias, scale = draw(name, dtype, seed)
        args = arguments(q, k, v, bias, scale)
        # What is hidden has no part in the yardstick either, which multiplies it by 0.
        clean = (q, k.nan_to_num(1, 1, 1), v.nan_to_num(1, 1, 1), *args[3:])
        exact = OPS["cross_attention"].reference(*testing.to_float64(args))
        for library_name in ("FA3", "FA4"):
            got = FORWARD[library_name].call(q, strided(name, k), strided(name, v), *args[3:])
            assert all(t.is_contiguous() for t in got)
            what = f"{name}, {library_name}"
            testing.assert_within_budget(got, testing.yardstick("cross_attention", args)(*clean), exact, what)
            nothing = (bias == -INF).all(-1)
            if nothing.any():
                nothing = nothing.view(2, -1, 1).expand(2, 3, 43)
                assert (got[0].transpose(1, 2)[nothing] == 0).all()
                assert (got[1] == -INF).equal(nothing)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_gradients(packages, name, dtype):
    """Of a bias in the tensors' dtype: one of float32 is refused, whose gradient may not be rounded so."""
    packages("FA4")
    op = OPS["cross_attention_backward"]
    for seed in range(3):
        q, k, v, bias, scale = draw(name, dtype, seed)
        k, v, bias = k.nan_to_num(1, 1, 1), v.nan_to_num(1, 1, 1), bias.to(dtype)
        args = arguments(q, k, v, bias, scale)
        out, lse = FORWARD["FA4"].call(*args)
        make = testing.Make(dtype, seed=seed + 9)
        grad_lse = make.randn(2, 3, 43, dtype=torch.float32) if seed == 1 else None
        args = make.randn(*out.shape), grad_lse, q, k, v, bias, out, lse, *args[4:]
        assert BACKWARD["FA4"].refuse(*args) is None
        wide = *args[:5], bias.float(), *args[6:]
        assert BACKWARD["FA4"].refuse(*wide) == (f"would round the gradient of a float32 key_bias to {str(dtype)[6:]}")
        got = BACKWARD["FA4"].call(*args)
        assert all(t.is_contiguous() for t in got)
        exact = op.reference(*testing.to_float64(args))
        testing.assert_within_budget(got, testing.yardstick(op.name, args)(*args), exact, f"{name}, {seed}")
        hidden = (bias == -INF).view(2, -1, 77).expand(2, 3, 77)
        for grad in got[1:3]:
            assert (grad.transpose(1, 2)[hidden] == 0).all()


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_libraries_on_a_gpu(name, dtype):
    """Every one that there is and that takes the call, its gradient too."""
    q, k, v, bias, scale = draw(name, dtype, 1)  # D = 128
    args = tuple(map(on_gpu, arguments(q, k.nan_to_num(1, 1, 1), v.nan_to_num(1, 1, 1), bias.to(dtype), scale)))
    exact = OPS["cross_attention"].reference(*testing.to_float64(args))
    at_dtype = testing.yardstick("cross_attention", args)(*args)
    ran = [one for one in library.FORWARD if "cuda" in one.devices and one.refuse(*args) is None]
    if library.refuse(*args) is not None or not ran:
        pytest.skip(reason="no library takes a key bias here")
    for one in ran:
        testing.assert_within_budget(one.call(*args), at_dtype, exact, f"{name}, {one.name}")
    out, lse = at_dtype
    gradient = torch.randn(out.shape, device="cuda").to(dtype), None, *args[:4], out.contiguous(), lse, *args[4:]
    op = OPS["cross_attention_backward"]
    exact = op.reference(*testing.to_float64(gradient))
    at_dtype = testing.yardstick(op.name, gradient)(*gradient)
    for one in library.BACKWARD:
        if "cuda" in one.devices and one.refuse(*gradient) is None:
            testing.assert_within_budget(one.call(*gradient), at_dtype, exact, f"gradient, {name}, {one.name}")


@pytest.mark.parametrize("dtype", HALF)
def test_parts_sum_to_the_bias(dtype):
    """Within 2^-24 of it, from the smallest to the largest that is of use."""
    for scale in (2.0**-9, 0.088, 1.0, 300.0):
        magnitude = torch.logspace(-3, 4, 2000, dtype=torch.float64)
        bias = torch.cat([magnitude, -magnitude])
        parts = library_bias._split(bias, scale, dtype).double()
        total = (parts * torch.tensor(library_bias._FACTORS[dtype], dtype=torch.float64)).sum(-1) * scale
        assert ((total - bias).abs() <= bias.abs() * 2.0**-24 + 1e-7).all()
    special = library_bias._split(torch.tensor([-INF, INF, torch.nan]), 0.1, dtype).double().sum(-1)
    assert special[0] < -1e3 and special[0].isfinite() and special[1:].isnan().all()


def test_choice(packages):
    """In the order of measurements, and Triton where there are too few scores to pay for widening."""
    packages()
    assert chosen(**LARGE).library == "SDPA cuDNN"
    choice = chosen(biased=True)
    assert (choice.backend, choice.refused["library"]) == (
        "triton",
        "slower than our kernel here: too few scores to pay for the extra channels of the bias",
    )
    assert chosen(biased=True, backend="library").library == "SDPA cuDNN"
    gradient = chosen_gradient(**LARGE)
    assert gradient.backend == "triton"
    assert "SDPA cuDNN: does not support key_bias; FA4: flash_attn.cute is not installed" in gradient.refused["library"]
    for name in ("FA4", "fa3-fwd", "FA3"):
        packages(name)
        assert chosen(**LARGE).library == name
    half = {"bias_dtype": torch.bfloat16}
    assert chosen_gradient(**LARGE, **half).library == "FA4"
    assert chosen_gradient(**LARGE, **half, with_lse=True).library == "FA4"
    assert chosen_gradient(**LARGE).backend == chosen_gradient(biased=True, **half).backend == "triton"
    assert chosen(**LARGE | {"size": 64}).library == "FA4"
    assert chosen(**LARGE | {"size": 64}).refused["library FA3"] == "a key bias needs D of 128, got 64"
    assert "scale of" in chosen(**LARGE, scale=1e-4, dtype=torch.float16).refused["library"]


def test_choice_elsewhere(packages):
    packages(capability=(8, 0))
    choice = chosen(**LARGE)
    assert choice.backend == "triton"
    assert (
        "flash-attn: flash_attn.flash_attn_interface is not installed; SDPA flash: does not support key_bias"
        in (choice.refused["library"])
    )
    packages(capability=(10, 0))
    assert "SDPA cuDNN: a key bias needs compute capability 9.0" in chosen(**LARGE).refused["library"]
    packages("FA4", "flash-attn", capability=(10, 0))
    assert chosen(**LARGE).library == "FA4"
    packages("flash-attn", capability=(8, 0))
    assert "flash-attn: does not support key_bias" in chosen(**LARGE).refused["library"]


def test_channels(machine):
    """144 for D = 128 on Hopper; Blackwell's kernels know 192, with values of 128."""
    q = torch.empty(1, 1, 1, 128)
    machine((9, 0))
    assert [library_bias.width(size) for size in (64, 80, 112, 124, 128)] == [80, 96, 128, 128, 144]
    assert library.packages.FA4.bias_width(q) == 144
    machine((10, 0))
    assert library.packages.FA4.bias_width(q) == 192
    assert library.packages.FA4.bias_width(q[..., :112]) == 128
