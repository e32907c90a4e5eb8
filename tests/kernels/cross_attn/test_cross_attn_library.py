"""The libraries of cross-attention: which one runs, why others do not, what they are called with, what they return."""

import sys

import pytest
import torch
from backend_helpers import compiled
from library_helpers import MODULES, chosen, flash_attn_functions
from torch.utils._python_dispatch import TorchDispatchMode

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, _extension, cross_attention, testing
from vidmem_kernels.cross_attn import library, library_packages, reference
from vidmem_kernels.cross_attn.samples import PLAIN


def qkv(queries=70, keys=90, size=16, value_size=None, dtype=torch.float32, grad=False):
    shapes = [(2, queries, 3, size), (2, keys, 3, size), (2, keys, 3, value_size or size)]
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes]


def test_what_is_installed_is_found_without_importing_it():
    installed = library_packages._installed
    assert installed("this") and "this" not in sys.modules
    assert installed("wsgiref.validate") and "wsgiref" not in sys.modules
    assert not installed("flash_attn_of_tomorrow") and not installed("flash_attn_of_tomorrow.cute")
    assert not installed("wsgiref.cute")


def exact_and_reference(args):
    options = {**PLAIN, "scale": args[0].shape[3] ** -0.5}
    wide = [t.detach().double() for t in args]
    return reference.cross_attention(*wide, *options.values()), reference.cross_attention(*args, *options.values())


@pytest.mark.parametrize("name", list(MODULES))
def test_packages_are_called_as_documented(machine, name):
    calls = []
    machine(modules={MODULES[name]: flash_attn_functions(calls, name)})
    (found,) = (one for one in library.FORWARD if one.name == name)
    q, k, v = qkv(dtype=torch.bfloat16)
    options = {**PLAIN, "scale": 0.25}
    assert found.refuse(q, k, v, *options.values()) is None
    got = found.call(q, k, v, *options.values())
    assert calls == [(False, True, 0.25, {})]
    assert all(t.is_contiguous() for t in got)
    exact, at_dtype = exact_and_reference((q, k, v))
    testing.assert_within_budget(got, at_dtype, exact, name)


def test_packages_in_order_of_speed(machine):
    """Each is taken when those before it are missing."""
    machine()
    expected = {f"library {name}": f"{MODULES[name]} is not installed" for name in ("FA3", "fa3-fwd", "FA4")}
    choice = chosen()
    assert (choice.backend, choice.library, choice.refused) == ("library", "SDPA cuDNN", expected)
    assert str(choice).splitlines() == [
        "cross_attention on cuda:0: library (SDPA cuDNN)",
        "  not library FA3: flash_attn_interface is not installed",
        "  not library fa3-fwd: fa3_fwd_interface is not installed",
        "  not library FA4: flash_attn.cute is not installed",
    ]
    for name in ("FA4", "fa3-fwd", "FA3"):
        machine(modules={MODULES[name]: flash_attn_functions([], name)})
        assert chosen().library == name


def test_what_each_library_refuses(machine):
    machine(modules={module: flash_attn_functions([], name) for name, module in MODULES.items()})
    assert chosen().library == "FA3"
    choice = chosen(256)
    assert choice.library == "FA3"
    machine((8, 0))
    choice = chosen()
    assert choice.library == "flash-attn"
    assert choice.refused == {
        "library FA3": "needs compute capability 9.0",
        "library fa3-fwd": "needs compute capability 9.0",
        "library FA4": "needs compute capability 9.0 or 10.0 or 10.3",
        "library SDPA cuDNN": "needs compute capability 9.0, 10.0 or 10.3",
    }
    assert chosen(dtype=torch.float16).refused["library fa3-fwd"] == "needs bfloat16, got float16"
    machine((10, 0))
    assert chosen().library == "FA4"
    assert chosen(192).refused["library FA4"] == "needs D of at most 128 or 256, got 192"
    assert chosen(192).refused["library SDPA cuDNN"] == "needs D of at most 128, got 192"


def test_calls_that_no_library_takes(machine):
    machine((7, 5))
    assert chosen().refused["library"] == "needs compute capability 8.0 or later"
    machine()
    assert chosen(dtype=torch.float32).refused["library"] == "needs bfloat16 or float16 on cuda, got float32"
    assert chosen(scale=-1.0).refused["library"] == "needs a positive scale, got -1.0"
    assert chosen(36).refused["library"] == "needs D to be a multiple of 8 up to 256, got 36"
    assert chosen(264).refused["library"] == "needs D to be a multiple of 8 up to 256, got 264"


def test_a_broken_or_old_package_is_passed_over(machine):
    module = MODULES["flash-attn"]
    machine((8, 0), modules={module: {"flash_attn_func": lambda q, k, v, softmax_scale=None: None}})
    choice = chosen()
    assert choice.library == "SDPA flash"
    assert choice.refused["library flash-attn"] == f"{module} is too old: flash_attn_func has no return_attn_probs"
    library_packages._load.cache_clear()
    del sys.modules[module].flash_attn_func
    assert f"{module} does not load: module '{module}' has no" in chosen().refused["library flash-attn"]


def test_what_cudnn_refuses(machine):
    machine((10, 0))
    assert chosen().library == "SDPA cuDNN"
    assert chosen(192).refused["library SDPA cuDNN"] == "needs D of at most 128, got 192"
    assert chosen(queries=1).refused["library SDPA cuDNN"] == "needs sequences longer than 1"
    machine((10, 0), cudnn=91002)
    assert chosen().refused["library SDPA cuDNN"] == "needs cuDNN 9.15.1, got 91002"
    machine((10, 0))
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert "enable_cudnn_sdp(False)" in chosen().refused["library SDPA cuDNN"]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_choice_on_the_cpu():
    """Ours first; the library is there for whom asks for it, or has no compiled kernels."""
    args = qkv()
    if _extension.module is not None and _extension.module.cpu_capability() != "baseline":
        assert vk.explain(cross_attention, *args)[0].backend == "cpu"
    (choice,) = vk.explain(cross_attention, *args, backend="library")
    assert (choice.backend, choice.library, choice.refused) == ("library", "SDPA flash", {})
    assert str(choice) == "cross_attention on cpu: library (SDPA flash)"
    (choice,) = vk.explain(cross_attention, *args, backend="reference")
    assert choice.library is None


@compiled
def test_auto_stays_auto_for_the_gradient():
    """The gradient chooses anew; an explicit backend is kept."""
    args = qkv(grad=True)
    for backend, expected in (("auto", vk.explain(cross_attention, *args)[0].backend), ("library", "library")):
        out = cross_attention(*args, backend=backend)
        with _dispatch.recording() as choices:
            out.sum().backward()
        assert [(c.op, c.backend) for c in choices] == [("cross_attention_backward", expected)]


def test_a_plain_call_copies_no_rows():
    """(B, L, H, D) in and out, however the library wants its heads: views, but for lse."""
    args, seen = qkv(), []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func.overloadpacket.__name__, args[0].dim()))
            return func(*args, **kwargs or {})

    with Seen():
        library.FORWARD[-1].call(*args, *PLAIN.values())
    assert set(seen) <= {("transpose", 4), ("_scaled_dot_product_flash_attention_for_cpu", 4), ("clone", 3)}


def test_a_plain_call_takes_few_steps():
    """Python functions of this package between the caller and a kernel: what the call itself costs, in any run."""
    args, steps = qkv(), []

    def note(frame, event, arg):
        if event == "call" and "vidmem_kernels" in frame.f_code.co_filename:
            steps.append(frame.f_code.co_name)

    cross_attention(*args, backend="library")  # imports and caches
    sys.setprofile(note)
    try:
        cross_attention(*args, backend="library")
    finally:
        sys.setprofile(None)
    assert "flash" in steps and len(steps) <= 40, steps


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_equals_reference(dtype, with_lse):
    """Values and gradients of the SDPA rung, through lse too."""
    args = qkv(dtype=dtype, grad=True)
    results = []
    for backend in ("library", "reference"):
        out, lse = cross_attention(*args, return_lse=True, backend=backend)
        loss = (out.float() ** 2).sum() + (lse.sin().sum() if with_lse else 0)
        results.append((out, lse, *torch.autograd.grad(loss, args)))
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


def test_library_says_why_not():
    q, k, v = qkv(7, 11, 4, 3)
    same = k
    time = {"q_time": torch.zeros(7), "k_time": torch.zeros(11), "window": (0, 0)}
    index = torch.zeros(2, 1, 1, 1, dtype=torch.int32)
    cases = [
        ((q, k, same), {"key_bias": torch.zeros(2, 11)}, "does not support key_bias"),
        ((q, k, same), time, "does not support window"),
        ((q, k, same), {"block_index": index}, "does not support block_index"),
        ((q, k, v), {}, "needs D equal to Dv, got 4 and 3"),
        ((q, k[:, :0], same[:, :0]), {}, "needs tensors that are not empty"),
        ((q.double(), k.double(), same.double()), {}, "float64 is only run by the reference, for checks"),
    ]
    for args, options, reason in cases:
        with pytest.raises(vk.BackendError, match=reason):
            cross_attention(*args, **options, backend="library")
