"""Resets what a model keeps from earlier forward passes when an adapter or its memory changes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import CodeType

from torch import nn


def reset_caches(model: nn.Module) -> None:
    """Empties diffusers' caches (first block, attention, Taylor), which were computed with another memory.

    Caches that were applied to blocks directly, not by `model.enable_cache`, are emptied too.
    """
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            registry.reset_stateful_hooks(recurse=False)


def forget_compiled(model: nn.Module) -> None:
    """Makes torch.compile trace again, if it has traced this model.

    torch.compile ignores module hooks that are added or removed later
    (`torch._dynamo.config.skip_nnmodule_hook_guards`). All compiled functions of the process are traced again at their
    next call.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    if any(_debug_get_cache_entry_list(code) for code in {*_codes(model)}):
        dynamo.reset()


def _codes(model: nn.Module) -> Iterator[CodeType]:
    """The code objects that a compiled graph of the model may start with: the forward functions of its modules."""
    for module in model.modules():
        for function in (type(module).forward, vars(module).get("forward")):
            while function is not None:
                if isinstance(function, functools.partial):
                    function = function.func
                if hasattr(function, "__code__"):
                    yield function.__code__
                function = getattr(function, "__wrapped__", None)
