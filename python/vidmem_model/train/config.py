"""How a model is optimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..checks import MOST_SECONDS, MOST_SEED, Checked, Former, OneOf, not_negative, positive, within


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How a model is optimised.

    Args:
        steps: optimisation steps.
        batch: samples a step, over all processes.
        lr: learning rate of AdamW after the warm-up.
        muon_lr: learning rate of Muon, of which an update is about as large as AdamW's, for the matrices of
            the transformer's blocks (those that read the prompt apart); 0 leaves them to AdamW.
        fitted_lr: share of `lr` for the layers that a linear start sets. AdamW's steps do not get smaller
            near an optimum, and at the full rate they lead away from it.
        warmup_steps: steps over which the learning rate rises from zero.
        schedule: "cosine" (down to a hundredth) or "constant".
        weight_decay: of matrices; norms, biases and tables have none.
        max_grad_norm: largest norm of the gradient.
        ema_decay: of the moving average of the weights, which is what is saved in the end.
        seed: of the initial weights and of all samples.
        precision: "float32", "bfloat16" by autocast, or "auto": bfloat16 where the device multiplies it in
            hardware. Where it does not, a product in bfloat16 can take a hundred times as long.
        checkpoint_every, log_every: in steps.
        max_seconds: train for so long at most in one call, which then ends with what it has, a checkpoint and the
            model; another call goes on. The preparation before the first step does not count. Null for no limit.
        draw_ahead: threads that draw batches while others are trained on; 0 draws each when its step begins.
        cuda_graph: launch the forward and backward pass of a step as one CUDA graph instead of op by op; for one
            process, and for a text encoder that is trained with the model.
        threads: of the CPU; null leaves them as they are.
        device: "cpu", "cuda", or "auto".

    Raises:
        ValueError: a value is out of range.
    """

    FORMER: ClassVar[dict[str, Former]] = {"warmup": Former("warmup_steps"), "clip_norm": Former("max_grad_norm")}

    steps: Annotated[int, positive(1_000_000_000)] = 10_000
    batch: Annotated[int, positive(65_536)] = 8
    lr: Annotated[float, positive(1e6)] = 3e-4
    muon_lr: Annotated[float, not_negative(1e6)] = 0.0
    fitted_lr: Annotated[float, not_negative(1e6)] = 1.0
    warmup_steps: Annotated[int, not_negative(1_000_000_000)] = 200
    schedule: Annotated[str, OneOf("cosine", "constant")] = "cosine"
    weight_decay: Annotated[float, not_negative(1e6)] = 0.01
    max_grad_norm: Annotated[float, positive(1e9)] = 1.0
    ema_decay: Annotated[float, within(0, 1, below=True)] = 0.999
    seed: Annotated[int, not_negative(MOST_SEED)] = 0
    precision: Annotated[str, OneOf("float32", "bfloat16", "auto")] = "float32"
    checkpoint_every: Annotated[int, positive(1_000_000_000)] = 500
    log_every: Annotated[int, positive(1_000_000_000)] = 50
    max_seconds: Annotated[float | None, positive(MOST_SECONDS)] = None
    draw_ahead: Annotated[int, not_negative(4096)] = 0
    cuda_graph: bool = False
    threads: Annotated[int | None, positive(4096)] = None
    device: Annotated[str, OneOf("auto", "cpu", "cuda")] = "auto"
