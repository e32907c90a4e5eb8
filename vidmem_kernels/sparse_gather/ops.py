"""Registers the ops of sparse gathering: schemas, fakes and gradients."""

from __future__ import annotations

import torch

from .._dispatch import is_pinned
from .._numerics import accumulate_dtype
from .._registry import register_op
from . import reference

# --- gather_tokens ---


def _gather_fake(bank, index, scale, out_dtype):
    if out_dtype is None:
        out_dtype = bank.dtype if scale is None else torch.float32
    return index.new_empty(*index.shape, bank.shape[2], dtype=out_dtype)


def _gather_setup(ctx, inputs, output):
    bank, index, scale, _ = inputs
    ctx.save_for_backward(index, scale, bank if scale is not None else None)
    ctx.bank_shape, ctx.bank_dtype, ctx.bank_device = bank.shape, bank.dtype, bank.device


def _gather_backward(ops, ctx, grad):
    index, scale, bank = ctx.saved_tensors
    batch, rows, _ = ctx.bank_shape

    def scatter(values):
        where = index
        if (
            batch == 1 != values.shape[0]
        ):  # a bank shared by the batch: one sum over the batch, not one per element that autograd adds
            count = values.shape[0] * values.shape[1]
            values, where = values.reshape(1, count, values.shape[2]), index.reshape(1, count)
        return ops.scatter_add_tokens(values, where, rows).to(ctx.bank_device)

    if scale is None:
        wider = torch.promote_types(grad.dtype, ctx.bank_dtype)
        return scatter(grad.to(wider)).to(ctx.bank_dtype), None, None, None
    if ctx.needs_input_grad[0]:
        raise RuntimeError("gather_tokens: bank must not require a gradient, which 8-bit dtypes cannot have; detach it")
    # out = scale * row, so d/dscale is <grad, row>; the unscaled rows are gathered again.
    row = ops.gather_tokens(bank, index, torch.ones_like(scale, pin_memory=scale.is_pinned()), torch.float32)
    along = (grad.to(torch.float32) * row).sum(dim=2, keepdim=True)
    return None, None, scatter(along).squeeze(2), None


def _gather_refuse_triton(bank, index, scale, out_dtype):
    if bank.device != index.device:
        return "needs the bank on the GPU, got host memory"
    return None


def _gather_refuse_cuda(bank, index, scale, out_dtype):
    on_host = [t for t in (bank, scale) if t is not None and t.device.type == "cpu"]
    if not all(is_pinned(t) for t in on_host):
        return "needs a bank on the GPU or in pinned host memory"
    return None


register_op(
    "gather_tokens(Tensor bank, Tensor index, Tensor? scale=None, ScalarType? out_dtype=None) -> Tensor",
    reference=reference.gather_tokens,
    fake=_gather_fake,
    setup_context=_gather_setup,
    backward=_gather_backward,
    autocast=(),
    triton="triton_gather",
    refuse={"triton": _gather_refuse_triton, "cuda": _gather_refuse_cuda},
    batch="index",
    broadcasts=("bank", "scale"),
)

# --- scatter_add_tokens ---


def _scatter_fake(src, index, num_rows):
    return src.new_empty(src.shape[0], num_rows, src.shape[2])


def _scatter_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ops, ctx, grad):
    return ops.gather_tokens(grad, ctx.saved_tensors[0]), None, None


register_op(
    "scatter_add_tokens(Tensor src, Tensor index, SymInt num_rows) -> Tensor",
    reference=reference.scatter_add_tokens,
    fake=_scatter_fake,
    setup_context=_scatter_setup,
    backward=_scatter_backward,
    autocast=(),
    triton="triton_scatter",
)

# --- quantize_rows ---


def _quantize_fake(x, dtype):
    scale_dtype = accumulate_dtype(x.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=scale_dtype)


def _quantize_setup(ctx, inputs, output):
    x, ctx.dtype = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[0])


def _quantize_backward(ops, ctx, _, grad_scale):
    return ops.quantize_rows_backward(grad_scale, ctx.saved_tensors[0], ctx.dtype), None


register_op(
    "quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    reference=reference.quantize_rows,
    fake=_quantize_fake,
    setup_context=_quantize_setup,
    backward=_quantize_backward,
    autocast=(),
    triton="triton_quantize",
)


def _quantize_backward_fake(grad_scale, x, dtype):
    return x.new_empty(x.shape)


register_op(
    "quantize_rows_backward(Tensor grad_scale, Tensor x, ScalarType dtype) -> Tensor",
    reference=reference.quantize_rows_backward,
    fake=_quantize_backward_fake,
    autocast=(),
    triton="triton_quantize",
)

# --- select_tokens ---


def _select_fake(x, keep, score):
    kept = x.shape[0], keep
    return x.new_empty(*kept, x.shape[2]), x.new_empty(kept, dtype=torch.int32)


def _select_setup(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.num_rows = inputs[0].shape[1]


def _select_backward(ops, ctx, grad, _):
    return ops.scatter_add_tokens(grad, ctx.saved_tensors[0], ctx.num_rows), None, None


register_op(
    "select_tokens(Tensor x, SymInt keep, Tensor? score=None) -> (Tensor, Tensor)",
    reference=reference.select_tokens,
    fake=_select_fake,
    setup_context=_select_setup,
    backward=_select_backward,
    autocast=(),
    triton="triton_select",
)

# --- topk_blocks ---


def _topk_blocks_fake(q, k, block_q, block_k, topk):
    return q.new_empty(q.shape[0], q.shape[2], -(-q.shape[1] // block_q), topk, dtype=torch.int32)


def _topk_blocks_refuse_triton(q, k, block_q, block_k, topk):
    return f"needs topk of at most 4,096, got {topk:,}" if topk > 4096 else None


register_op(
    "topk_blocks(Tensor q, Tensor k, SymInt block_q, SymInt block_k, SymInt topk) -> Tensor",
    reference=reference.topk_blocks,
    fake=_topk_blocks_fake,
    autocast=(),
    triton="triton_topk",
    refuse={"triton": _topk_blocks_refuse_triton},
)


# `topk_blocks` in causal order, on means that are already computed: plain PyTorch on every backend.
register_op(
    "topk_blocks_causal(Tensor q, Tensor k, Tensor last, Tensor present, SymInt topk) -> Tensor",
    reference=reference.topk_blocks_causal,
    fake=lambda q, k, last, present, topk: q.new_empty(q.shape[0], q.shape[2], q.shape[1], topk, dtype=torch.int32),
    autocast=(),
    broadcasts=("last", "present"),
)
