"""What a model remembers of earlier forwards and must forget when an adapter or its memory changes."""

from __future__ import annotations

import sys

from torch import nn


def reset_caches(model: nn.Module) -> None:
    """Empties diffusers' caches (first block, attention, Taylor): what is in them was computed from another memory.

    A cache that was applied to blocks alone, not by `model.enable_cache`, is emptied too.
    """
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            registry.reset_stateful_hooks(recurse=False)


def forget_compiled() -> None:
    """Makes torch.compile trace anew: it takes no notice of module hooks that come or go after it has traced.

    See `torch._dynamo.config.skip_nnmodule_hook_guards`. All compiled functions of the process are traced again when
    they are called next; the compiled kernels come from Inductor's cache.
    """
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
