"""What a model remembers of earlier forwards and must forget when an adapter or its memory changes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import CodeType

from torch import nn


def reset_caches(model: nn.Module) -> None:
    """Empties diffusers' caches (first block, attention, Taylor): what is in them was computed from another memory.

    A cache that was applied to blocks alone, not by `model.enable_cache`, is emptied too.
    """
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            registry.reset_stateful_hooks(recurse=False)


def forget_compiled(model: nn.Module) -> None:
    """Makes torch.compile trace anew, if it has traced such a model: of module hooks that come or go later it takes no
    notice (`torch._dynamo.config.skip_nnmodule_hook_guards`).

    All compiled functions of the process are traced again when they are called next.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    if any(_debug_get_cache_entry_list(code) for code in {*_codes(model)}):
        dynamo.reset()


def _codes(model: nn.Module) -> Iterator[CodeType]:
    """What a compiled graph of the model may begin with: the forwards of its modules, in all that is around them."""
    for module in model.modules():
        for function in (type(module).forward, vars(module).get("forward")):
            while function is not None:
                if isinstance(function, functools.partial):
                    function = function.func
                if hasattr(function, "__code__"):
                    yield function.__code__
                function = getattr(function, "__wrapped__", None)
