"""Shared by the tests of sparse gathering and of MemoryBank."""

import pytest
import torch

from vidmem_kernels import quantize_rows

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
    """What a bank of `dtype` gives back for `tokens`, in float32."""
    if dtype not in QUANTIZED:
        return tokens.to(dtype).float()
    rows, scale = quantize_rows(tokens, dtype)
    return rows.float() * scale.unsqueeze(1)
