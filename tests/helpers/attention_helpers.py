"""Calls of cross-attention, and SDPA in float64 with the equivalent dense mask."""

import math

import torch
import torch.nn.functional as F

from vidmem_kernels import cross_attention, testing

INF, F64 = math.inf, torch.float64
DEFAULTS = {
    "key_bias": None, "num_sinks": 0, "q_time": None, "k_time": None, "window": None, "block_index": None,
    "block_size": (16, 12), "scale": None,
}  # fmt: skip


def arguments(which, batch=2, queries=70, keys=210, heads=2, size=12, value_size=20, dtype=torch.float32, factor=1.0):
    """(q, k, v, then the other arguments of the op by name)"""
    q, k = (factor * torch.randn(batch, n, heads, size) for n in (queries, keys))
    options = dict.fromkeys(("key_bias", "num_sinks", "q_time", "k_time", "window", "block_index"))
    options |= {"num_sinks": 0, "block_size": [32, 24], "scale": size**-0.5 if size else 1.0}
    if "bias" in which:
        options["key_bias"] = torch.randn(batch, heads, keys).to(dtype)
        options["key_bias"][:1, :, ::5] = -INF
    if "sinks" in which:
        options["num_sinks"] = min(3, keys)
    if "window" in which:
        options["q_time"] = torch.arange(queries) / 7
        options["k_time"] = (torch.arange(keys) // 10).expand(batch, keys).float()
        options["window"] = [3.5, 1.0]
    if "blocks" in which:
        shape = (batch, heads, -(-queries // 32), 5)
        options["block_index"] = torch.randint(-1, max(0, -(-keys // 24)), shape, dtype=torch.int32)
    value = torch.randn(batch, keys, heads, value_size)
    return q.to(dtype), k.to(dtype), value.to(dtype), options


def visible(q, k, options):
    """Which query sees which key, by the definition of each feature: (B, H, Lq, Lk)."""
    o = {**DEFAULTS, **options}
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    seen = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if o["window"] is not None:
        at = o["q_time"].to(F64).expand(batch, queries).view(batch, 1, queries, 1)
        distance = o["k_time"].to(F64).expand(batch, keys).view(batch, 1, 1, keys) - at
        seen &= (distance >= -o["window"][0]) & (distance <= o["window"][1])
    if o["block_index"] is not None:
        row, column = (torch.arange(n) // size for n, size in zip((queries, keys), o["block_size"], strict=True))
        listed = o["block_index"].expand(batch, heads, -1, -1)
        for b in range(batch):
            for h in range(heads):
                for r in range(listed.shape[2]):
                    chosen = torch.isin(column, listed[b, h, r])
                    seen[b, h, row == r] &= chosen
    return seen | (torch.arange(keys) < o["num_sinks"])


def by_sdpa(q, k, v, options):
    """(out, lse) in float64, with the dense mask; 0 and -inf where nothing is visible."""
    bias = options.get("key_bias")
    seen = visible(q, k, options)
    q, k, v = (t.to(F64).transpose(1, 2) for t in (q, k, v))
    mask = torch.zeros(seen.shape, dtype=F64)
    if bias is not None:
        mask = mask + (bias.to(F64) if bias.dim() == 3 else bias.to(F64)[:, None])[:, :, None]
    mask = mask.masked_fill(~seen, -INF)
    some = (mask > -INF).any(-1)
    mask = mask.masked_fill(~some[..., None], 0)
    scale = options.get("scale") or q.shape[3] ** -0.5
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale).masked_fill(~some[..., None], 0)
    lse = torch.logsumexp(q @ k.mT * scale + mask, -1).masked_fill(~some, -INF)
    return out.transpose(1, 2), lse


def results_and_gradients(function, q, k, v, options, dtype=None):
    """(out, lse), and the gradients of q, k, v and key_bias through both."""
    options, names = dict(options), ["q", "k", "v"]
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k, v)]
    if options.get("key_bias") is not None:
        bias = options["key_bias"].detach()
        options["key_bias"] = bias.to(dtype or bias.dtype).requires_grad_()
        leaves.append(options["key_bias"])
        names.append("key_bias")
    out, lse = function(*leaves[:3], options)
    make = testing.Make(q.dtype, seed=3)
    grad_out, grad_lse = make.randn(*out.shape).to(out.dtype), make.randn(*lse.shape, dtype=torch.float32).to(lse.dtype)
    loss = (out * grad_out).sum() + (lse.masked_fill(lse == -INF, 0) * grad_lse).sum()  # -inf is a constant
    return (out.detach(), lse.detach()), dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


def op_of(backend):
    def call(q, k, v, options):
        return cross_attention(q, k, v, **options, return_lse=True, backend=backend)

    return call
