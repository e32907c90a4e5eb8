"""Helpers shared by the tests of sparse gathering, token merging and MemoryBank."""

import pytest
import torch

from vidmem_kernels import _dispatch, quantize_rows
from vidmem_kernels._op import OPS

BANK_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
QUANTIZED = BANK_DTYPES[3:]


def ids(value):
    """Test ids "int8" rather than "torch.int8"."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def refuses(error, message, function, *args, **kwargs):
    """Asserts that the call raises `error` with exactly this message."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == message


def fill(bank, count, seed=0):
    """Appends `count` random tokens with positions, and returns both."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, bank.channels, generator=generator)
    positions = torch.rand(count, 3, generator=generator) * 100
    bank.append(tokens, positions)
    return tokens, positions


def stored(tokens, dtype):
    """The rows that a bank of `dtype` returns for `tokens`, in float32."""
    if dtype not in QUANTIZED:
        return tokens.to(dtype).float()
    rows, scale = quantize_rows(tokens, dtype)
    return rows.float() * scale.unsqueeze(1)


def cpu_backends(*ops):
    """Backends to run a test of these ops on: the compiled kernels where any of them has one, and the reference."""
    return ["cpu", "reference"] if any(backend_for(op, "cpu") == "cpu" for op in ops) else ["reference"]


def backend_for(op, backend):
    """`backend` if it was built for `op`, else the reference."""
    return backend if _dispatch.unavailable(OPS[op], backend, "cpu") is None else "reference"
