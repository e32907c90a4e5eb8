"""Adds token merging to the self-attention of diffusers' video models, and removes it again."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from torch import Tensor, nn

from .._checks import check_int
from .families import base_model, family_of
from .token_merging_config import TokenMergingConfig
from .token_merging_plans import MergingState
from .token_merging_processor import MergingProcessor

_APPLY = "apply_token_merging"


def apply_token_merging(model: nn.Module, config: TokenMergingConfig | None = None, **options: object) -> TokenMerging:
    """Merges similar video tokens in the self-attention of a model, which reduces its time and memory.

    Keys and values are merged before the rotary embedding, by plans of `match_tokens` on the grid of latent frames; the
    attention is `cross_attention` with the log of the merged sizes as bias. Text, history and memory tokens in the same
    attention are not merged. The model can be trained, compiled (one graph for all sizes), copied and pickled. A block
    in which nothing merges calls its original processor.

    Args:
        model: a WanTransformer3DModel, HunyuanVideoTransformer3DModel, HunyuanVideoFramepackTransformer3DModel or a
            model of a family added by `register_family`. LoRA, fused projections and diffusers' caches may be added
            before or after.
        config: what is merged; default `TokenMergingConfig()`.
        **options: fields of `TokenMergingConfig`, instead of `config`.

    Returns:
        A handle that disables and removes the merging; also a context manager, which removes it at its end.

    Raises:
        TypeError: the model belongs to no known family, an option is not a field, or both options and a config are
            given.
        ValueError: a value is invalid, or names a block that the model does not have.
        RuntimeError: the model merges tokens already.

    Examples:
        >>> merging = apply_token_merging(model, kv_ratio=0.5)
        >>> merging.enabled = False  # compare with the original
        >>> merging.remove()
    """
    if config is None:
        fields = TokenMergingConfig.__dataclass_fields__
        for name in options:
            if name not in fields:
                raise TypeError(f"{_APPLY}: options must be among {', '.join(fields)}, got {name}")
        config = TokenMergingConfig(**options)
    elif not isinstance(config, TokenMergingConfig):
        raise TypeError(f"{_APPLY}: config must be a TokenMergingConfig, got {type(config).__name__}")
    elif options:
        raise TypeError(f"{_APPLY}: options cannot be combined with config, got config and {', '.join(options)}")
    family, model = family_of(model), base_model(model)
    if _processors(model):
        raise RuntimeError(f"{_APPLY}: model must not merge tokens already, got one that does; call remove() first")
    blocks = list(family.blocks(model))
    config.check_blocks(len(blocks))
    for block in blocks if callable(config.kv_ratio) or callable(config.q_ratio) else ():
        config.ratios(block.number, 0)  # raises an error before anything is changed
    state = MergingState(config)
    merging = [block.number for block in blocks if config.merges(block.number)]
    group = {number: i // config.reuse_blocks for i, number in enumerate(merging)}
    for block in blocks:  # all blocks, because other processors do not accept a rotary embedding with a grid
        attn = getattr(block.module, family.self_attention)
        processor = MergingProcessor(attn.processor, family, state, block.number, group.get(block.number, 0))
        attn.set_processor(processor)
        state.on_step.append(processor.set_step)
    state.reset()
    family.attach(model, state.record)
    model.register_forward_pre_hook(_BeginForward(state, type(model)), with_kwargs=True)
    return TokenMerging(model)


class TokenMerging:
    """A handle on the token merging of a model.

    As a context manager, it removes the merging at the end of the `with` block.

    Args:
        model: a model that merges tokens, such as a copy of one, for which `apply_token_merging` returned no handle.

    Raises:
        TypeError: the model belongs to no known family.
        RuntimeError: the model does not merge tokens; all methods raise it too, once the merging is removed.
    """

    def __init__(self, model: nn.Module):
        self._family, self._model = family_of(model), base_model(model)
        self._state()

    def _state(self) -> MergingState:
        for processor in _processors(self._model):
            return processor.state
        raise RuntimeError("TokenMerging: model must merge tokens, got one that does not, or no longer does")

    @property
    def config(self) -> TokenMergingConfig:
        """The configuration that `apply_token_merging` was called with."""
        return self._state().config

    @property
    def enabled(self) -> bool:
        """Whether tokens are merged; if not, the outputs equal those of the original model, bit by bit."""
        return self._state().enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"TokenMerging: enabled must be a bool, got {type(enabled).__name__}")
        self._state().enabled = enabled

    @property
    def step(self) -> int:
        """The denoising step, from 0.

        Forward passes are counted: those with the very same timestep tensor, which pipelines pass for the two halves of
        classifier-free guidance, are one step, and a timestep above the previous one starts a new video. Reading the
        timestep waits for the device; this happens only if ratios, `steps` or `reuse_steps` need it. Setting the step
        stops the counting until `reset`. A compiled model cannot count: set the step before each call if it matters.
        """
        return self._state().step

    @step.setter
    def step(self, step: int) -> None:
        state = self._state()
        check_int("TokenMerging", "step", step, 0)
        state.set_step(step)

    def reset(self) -> None:
        """Starts a new video: step 0, counted again, without plans and statistics."""
        self._state().reset()

    def stats(self) -> dict[str, Any]:
        """Returns statistics of the uncompiled forward passes since `apply_token_merging` or `reset`.

        Returns:
            A dict: "family"; "enabled"; "step"; "forwards", the number of forward passes; "plans_made"; "grid", (T, H,
                W) of
            the latest forward pass, None before the first; "blocks", by block number, for the latest forward pass in
            which the block merged: its "tokens", and the "queries" and "keys" left after merging, text included.
        """
        state = self._state()
        names = "tokens", "queries", "keys"
        return {
            "family": self._family.name,
            "enabled": state.enabled,
            "step": state.step,
            "forwards": state.forwards,
            "plans_made": state.plans_made,
            "grid": state.grid,
            "blocks": {block: dict(zip(names, n, strict=True)) for block, n in sorted(state.lengths.items())},
        }

    def remove(self) -> None:
        """Restores the previous processor of every attention.

        Raises:
            RuntimeError: it is removed already, or another processor has replaced or wrapped this one.
        """
        self._state()
        attentions = [getattr(block.module, self._family.self_attention) for block in self._family.blocks(self._model)]
        for i, attn in enumerate(attentions):
            if not isinstance(attn.processor, MergingProcessor):
                found = type(attn.processor).__name__
                raise RuntimeError(
                    f"TokenMerging: the attention of block {i} must have the processor that merges, got {found}; "
                    "first remove the adapters that were added later"
                )
        for attn in attentions:
            attn.set_processor(attn.processor.inner)
        self._family.detach(self._model)
        hooks = self._model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _BeginForward)]:
            del hooks[key]
            del self._model._forward_pre_hooks_with_kwargs[key]

    def __enter__(self) -> TokenMerging:
        return self

    def __exit__(self, *error: object) -> None:
        if _processors(self._model):  # it may have been removed inside the block
            self.remove()


class _BeginForward:
    """Pre-hook of a model that passes the timestep to the state; not a closure, so that the model pickles."""

    def __init__(self, state: MergingState, model_class: type[nn.Module]):
        self.state = state
        names = list(inspect.signature(model_class.forward).parameters)
        self.position = names.index("timestep") - 1 if "timestep" in names else None

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = kwargs.get("timestep")
        if timestep is None and self.position is not None and len(args) > self.position:
            timestep = args[self.position]
        self.state.begin_forward(timestep)


def _processors(model: nn.Module) -> list[MergingProcessor]:
    return [module for module in model.modules() if isinstance(module, MergingProcessor)]


def _skipped(attn: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """The result of an attention that diffusers skips: its inputs, including the text if it attends to text too."""
    hidden_states = kwargs.get("hidden_states", args[0] if args else None)
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    return hidden_states if text is None else (hidden_states, text)


# diffusers' LayerSkip looks processors up by class.
AttentionProcessorRegistry.register(MergingProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skipped))
