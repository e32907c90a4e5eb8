"""Attention libraries that also return lse: which there are, in which order, and what none of them supports.

The order follows measurements on an H200 (1 x 32,760 queries, 5,120 keys, 24 heads of 128, bfloat16):

plain, forward: FA3 and fa3-fwd 2.72 ms, cuDNN 2.93 ms; FA4 was not timed and is placed next to FA3.
plain, backward: cuDNN 9.2 ms, flash 18.3 ms, deterministic flash 31.8 ms; FA3 and FA4 were not timed.
with a key bias, forward: as extra channels (library_bias.py) FA3 and fa3-fwd 3.56 ms, cuDNN 3.71 ms, plus the time to
    add the channels; our Triton kernel 4.26 to 4.6 ms; cuDNN with the bias as an additive mask 4.66 ms, which is why it
    is not used.
with a key bias, backward: cuDNN with channels 23.5 ms, slower than our kernel (17.2 to 20.3 ms), so it is not used; FA4
    was not timed.
"""

from __future__ import annotations

import math

from .._checks import names
from .._op import Library
from .._refusals import refuse_float64
from . import library_packages as packages
from . import library_sdpa as sdpa
from .library_sdpa import HALF, capability


def refuse(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale) -> str | None:
    """Why no library can compute these results, or None."""
    for name, value in {"window": window, "block_index": block_index}.items():
        if value is not None:
            return f"does not support {name}"
    size, value_size = q.shape[3], v.shape[3]
    if size != value_size:
        return f"needs D equal to Dv, got {size} and {value_size}"
    if 0 in q.shape or k.shape[1] == 0:
        return "needs tensors that are not empty"
    if why := refuse_float64(q):
        return why
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"needs cpu or cuda tensors, got {q.device.type}"
    if q.dtype not in HALF:
        return f"needs {names(HALF)} on cuda, got {names([q.dtype])}"
    if size % 8 or size > 256:
        return f"needs D to be a multiple of 8 up to 256, got {size}"
    if not 0 < scale < math.inf:  # the libraries take the largest product for the largest score
        return f"needs a positive scale, got {scale}"
    if capability(q.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    return None


def refuse_backward(grad_out, grad_lse, q, k, v, key_bias, out, lse, *options) -> str | None:
    """Why no library can compute these gradients, or None."""
    return refuse(q, k, v, key_bias, *options)


FORWARD = (
    Library("FA3", ("cuda",), packages.FA3.forward, packages.FA3.refuse, packages.FA3.avoid),
    Library("fa3-fwd", ("cuda",), packages.FA3_FWD.forward, packages.FA3_FWD.refuse, packages.FA3_FWD.avoid),
    Library("FA4", ("cuda",), packages.FA4.forward, packages.FA4.refuse, packages.FA4.avoid),
    Library("SDPA cuDNN", ("cuda",), sdpa.cudnn, sdpa.refuse_cudnn, sdpa.avoid_cudnn),
    Library("flash-attn", ("cuda",), packages.FLASH_ATTN.forward, packages.FLASH_ATTN.refuse),
    Library("SDPA flash", ("cpu", "cuda"), sdpa.flash, sdpa.refuse_flash),
)
BACKWARD = (
    Library("SDPA cuDNN", ("cuda",), sdpa.cudnn_backward, sdpa.refuse_cudnn_backward, sdpa.avoid_second_pass),
    Library("FA4", ("cuda",), packages.fa4_backward, packages.refuse_fa4_backward, packages.avoid_fa4_backward),
    Library("FA3", ("cuda",), packages.fa3_backward, packages.refuse_fa3_backward),
    Library("SDPA flash", ("cpu", "cuda"), sdpa.flash_backward, sdpa.refuse_flash_backward, sdpa.avoid_flash_backward),
)
