"""`testing.poisoned_memory`: memory that nobody wrote shows, in Python and in C++, with no switch of torch touched."""

import threading
import warnings

import pytest
import torch
from backend_helpers import compiled
from torch._subclasses.fake_tensor import FakeTensorMode

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, _fast, _poison, testing
from vidmem_kernels._op import OPS

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
ONE = torch.ones(3, 4)
WAYS = {
    "empty": lambda dtype: torch.empty(3, 4, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(ONE.to(dtype)),
    "empty_like of strides": lambda dtype: torch.empty_like(ONE.to(dtype).T),
    "new_empty": lambda dtype: ONE.new_empty(2, 3, dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((2, 3), (1, 5), dtype=dtype),
    "vmap": lambda dtype: torch.vmap(lambda x: x.new_empty(2, dtype=dtype))(ONE),
}


@pytest.mark.parametrize("way", WAYS)
def test_new_memory_is_poisoned(way):
    with testing.poisoned_memory():
        for dtype in FLOATS:
            assert WAYS[way](dtype).to(torch.complex128).isnan().all()
        for dtype in INTEGERS:
            assert (WAYS[way](dtype) == torch.iinfo(dtype).max).all()
        assert WAYS[way](torch.bool).view(torch.uint8).eq(1).all()
        with torch.inference_mode():
            assert WAYS[way](torch.float32).isnan().all()


def test_on_every_device(device):
    with testing.poisoned_memory():
        assert torch.empty(3, 4, device=device).isnan().all()
        assert torch.empty_like(ONE.to(device)).isnan().all()


def test_no_switch_is_touched_and_all_is_as_before():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of kernels that take another's place
        kernel = torch.library.get_kernel("aten::empty_strided", "CPU")
        for _ in range(3):
            with testing.poisoned_memory():
                assert not torch.are_deterministic_algorithms_enabled()
                assert torch._C._len_torch_dispatch_stack() == 0
                with pytest.raises(KeyError), testing.poisoned_memory():
                    raise KeyError
                assert torch.empty(3).isnan().all()  # still
            assert _poison._library is None
            assert str(torch.library.get_kernel("aten::empty_strided", "CPU")) == str(kernel)


def test_threads_that_enter_and_leave_in_any_order():
    first, second = threading.Event(), threading.Event()

    def other():
        with testing.poisoned_memory():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=other)
    with testing.poisoned_memory():
        thread.start()
        first.wait(10)
    assert torch.empty(3).isnan().all()  # the other one is inside
    second.set()
    thread.join()
    assert _poison._library is None


def test_fakes_and_compiled_graphs():
    def f(x):
        return x.new_empty(2, 2).fill_(1) + x

    with testing.poisoned_memory():
        with FakeTensorMode():
            assert torch.empty(3).shape == (3,)
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        program = torch.export.export(torch.nn.Identity(), (torch.ones(2, 2),)).module()
        assert (compiled(torch.ones(2, 2)) == 2).all() and (program(torch.ones(2, 2)) == 1).all()


@compiled
@pytest.mark.parametrize("name", [n for n in sorted(OPS) if _dispatch.unavailable(OPS[n], "cpu", "cpu") is None])
def test_results_of_c_plus_plus_were_poisoned(name, monkeypatch):
    """Every result of a C++ kernel lies in memory that was filled before the kernel saw it."""
    poison, filled = _poison._poison, {}

    def noting(tensor):
        poison(tensor)
        if tensor.numel():
            filled[tensor.untyped_storage().data_ptr()] = tensor.numel()

    monkeypatch.setattr(_poison, "_poison", noting)
    seen = 0
    for sample in testing.samples(name):
        if _dispatch.refusal(OPS[name], "cpu", torch.device("cpu"), sample.args) is not None:
            continue
        filled.clear()
        with testing.poisoned_memory():
            results = getattr(torch.ops.vidmem_cpp, name)(*sample.args)
        for result in results if isinstance(results, tuple) else (results,):
            assert result.numel() == 0 or result.untyped_storage().data_ptr() in filled, sample.label
            seen += result.numel()
    assert seen


@compiled
@pytest.mark.parametrize("flag", testing.FLAGS)
def test_a_row_that_is_not_written_is_found(flag, monkeypatch):
    """With the kernels that run by default, and past the dispatcher too, where dispatch modes do not reach."""
    implementation = _dispatch.implementation

    def forgetful(op, backend, *rest):
        run = implementation(op, backend, *rest)
        if op.name != "gather_tokens" or backend != "cpu":
            return run

        def gather(*args):
            right = run(*args)
            out = torch.empty_like(right)
            if out.shape[1]:
                out[:, :-1] = right[:, :-1]
            return out

        return gather

    with testing.poisoned_memory():
        testing.check_backend(OPS["gather_tokens"], "cpu", torch.float32)
    monkeypatch.setattr(_dispatch, "implementation", forgetful)
    with testing.determinism(flag):
        with pytest.raises(AssertionError, match="NaN or infinity differ"):
            testing.check_backend(OPS["gather_tokens"], "cpu", torch.float32)
        for table in _fast._tables:
            table.clear()
        bank, index = torch.randn(1, 9, 4), torch.arange(3).view(1, 3)
        with testing.poisoned_memory():
            for _ in range(2):  # the second one is served by the fast path
                assert vk.gather_tokens(bank, index)[0, -1].isnan().all()
    for table in _fast._tables:
        table.clear()
