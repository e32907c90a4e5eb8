"""Token merging in the self-attention of other people's video models: one line in, one line out."""

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
    """Merges similar video tokens in a model's self-attention, whose time and memory fall with their number.

    Keys and values are merged before the rotary embedding, by plans of `match_tokens` on the grid of latent frames;
    attention is `cross_attention` with the logarithm of the merged sizes as bias. Text tokens, history and memory in
    the same attention stay as they are. The model trains, compiles (one graph for all sizes), and can be copied and
    pickled. A block in which nothing merges calls the very processor that it had.

    Args:
        model: a WanTransformer3DModel, HunyuanVideoTransformer3DModel, HunyuanVideoFramepackTransformer3DModel or a
            model of a family that `register_family` was given; LoRA, fused projections and diffusers' caches may
            come before or after.
        config: what is merged; by default `TokenMergingConfig()`.
        options: fields of `TokenMergingConfig`, instead of `config`.

    Returns:
        The handle that switches it off and takes it out; also a context manager, which takes it out at its end.

    Raises:
        TypeError: a model of no known family; options that no field has, or beside a config.
        ValueError: values that do not fit, a block that the model does not have.
        RuntimeError: the model merges already.
    """
    if config is None:
        fields = TokenMergingConfig.__dataclass_fields__
        for name in options:
            if name not in fields:
                raise TypeError(f"{_APPLY}: options must be of {', '.join(fields)}, got {name}")
        config = TokenMergingConfig(**options)
    elif not isinstance(config, TokenMergingConfig):
        raise TypeError(f"{_APPLY}: config must be a TokenMergingConfig, got {type(config).__name__}")
    elif options:
        raise TypeError(f"{_APPLY}: options must come without a config, got config and {', '.join(options)}")
    family, model = family_of(model), base_model(model)
    if _processors(model):
        raise RuntimeError(f"{_APPLY}: the model must not merge tokens already, got one that does; remove it first")
    blocks = list(family.blocks(model))
    config.check_blocks(len(blocks))
    for block in blocks if callable(config.kv_ratio) or callable(config.q_ratio) else ():
        config.ratios(block.number, 0)  # raises before anything is changed
    state = MergingState(config)
    merging = [block.number for block in blocks if config.merges(block.number)]
    group = {number: i // config.reuse_blocks for i, number in enumerate(merging)}
    for block in blocks:  # all of them: no other processor takes a rotary embedding with a grid
        attn = getattr(block.module, family.self_attention)
        processor = MergingProcessor(attn.processor, family, state, block.number, group.get(block.number, 0))
        attn.set_processor(processor)
        state.on_step.append(processor.set_step)
    state.reset()
    family.attach(model, state.record)
    model.register_forward_pre_hook(_BeginForward(state, type(model)), with_kwargs=True)
    return TokenMerging(model)


class TokenMerging:
    """Token merging in a model, as `apply_token_merging` put it there; at the end of a `with` it is taken out.

    Args:
        model: one that merges: of a copy, too, of which `apply_token_merging` has given no handle.

    Raises:
        TypeError: a model of no known family.
        RuntimeError: the model merges nothing; and from everything below, once the merging is removed.
    """

    def __init__(self, model: nn.Module):
        self._family, self._model = family_of(model), base_model(model)
        self._state()

    def _state(self) -> MergingState:
        for processor in _processors(self._model):
            return processor.state
        raise RuntimeError("TokenMerging: the model must merge tokens, got one that does not, or no longer")

    @property
    def config(self) -> TokenMergingConfig:
        return self._state().config

    @property
    def enabled(self) -> bool:
        """Whether tokens are merged; while not, the model gives what it gave before, to the bit."""
        return self._state().enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"TokenMerging: enabled must be a bool, got {type(enabled).__name__}")
        self._state().enabled = enabled

    @property
    def step(self) -> int:
        """The denoising step, from 0.

        Forwards are counted: those that get the very same tensor of times, as pipelines call the halves of
        classifier-free guidance, are one step, and a time above that before begins a new video (to see that, a forward
        waits for the device; only where ratios, `steps` or `reuse_steps` need it). What is set is not counted any more
        until `reset`; a compiled model whose steps matter must be told them so.
        """
        return self._state().step

    @step.setter
    def step(self, step: int) -> None:
        state = self._state()
        check_int("TokenMerging", "step", step, 0)
        state.set_step(step)

    def reset(self) -> None:
        """Begins a new video: step 0, counted again, no plan and no statistics."""
        self._state().reset()

    def stats(self) -> dict[str, Any]:
        """What forwards that were not compiled did since `apply_token_merging` or `reset`.

        Returns:
            "family"; "enabled"; "step"; "forwards" of the model; "plans_made"; "grid" (T, H, W) of the latest forward,
            None before; "blocks": for the latest forward in which it merged, by number of a block, its "tokens", and
            the "queries" and "keys" that were left of them, text included.
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
        """Gives every attention the processor that it had.

        Raises:
            RuntimeError: it is removed already, or another processor stands where this one was put.
        """
        self._state()
        attentions = [getattr(block.module, self._family.self_attention) for block in self._family.blocks(self._model)]
        for i, attn in enumerate(attentions):
            if not isinstance(attn.processor, MergingProcessor):
                found = type(attn.processor).__name__
                raise RuntimeError(
                    f"TokenMerging: the attention of block {i} must have the processor that merges, got {found}; "
                    "take out first what was put in later"
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
        if _processors(self._model):  # may have been removed inside
            self.remove()


class _BeginForward:
    """Pre-hook of a model: tells the state the times of the forward. No closure, so that the model pickles."""

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
    """What an attention that diffusers skips returns: its inputs, the text's where it attends to text too."""
    hidden_states = kwargs.get("hidden_states", args[0] if args else None)
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    return hidden_states if text is None else (hidden_states, text)


# diffusers' LayerSkip asks for processors by their class.
AttentionProcessorRegistry.register(MergingProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skipped))
