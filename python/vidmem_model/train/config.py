"""Configuration of the optimisation, shared by all training stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..checks import MOST_SECONDS, MOST_SEED, Checked, Former, OneOf, not_negative, positive, within


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Configuration of the optimisation.

    Args:
        steps: Number of optimisation steps.
        batch: Batch size, summed over all processes.
        lr: Peak learning rate of AdamW, after the warmup.
        muon_lr: Learning rate of Muon for the matrices of the transformer blocks, except those that read the prompt.
            Its updates are about as large as those of AdamW at the same rate. 0 trains them with AdamW.
        fitted_lr: Factor on `lr` for the layers that a linear start initialises. They start near an optimum, and
            AdamW at the full learning rate would move them away from it.
        warmup_steps: Steps over which the learning rate rises linearly from zero.
        schedule: Learning-rate schedule after the warmup: "cosine" (decays to 1 % of the peak) or "constant".
        weight_decay: Weight decay of matrices; norms, biases and embedding tables have none.
        max_grad_norm: Maximum norm of the gradient; larger gradients are clipped.
        ema_decay: Decay of the exponential moving average (EMA) of the weights, which is saved as the model.
        seed: Random seed of the initial weights and of all samples.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 if the device multiplies it in hardware.
            Without hardware support, a matrix product in bfloat16 can take a hundred times as long.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between lines of progress.
        max_seconds: Maximum time of one call, in seconds; the call then saves a checkpoint and the model, and the next
            call resumes. The time before the first step does not count. Null for no limit.
        draw_ahead: Number of threads that prepare the next batches during a step; 0 prepares each batch in its step.
        cuda_graph: Whether the forward and backward pass of a step are launched as one CUDA graph. Requires a single
            process, and a text encoder that is trained with the model.
        threads: Number of CPU threads; null keeps the current setting.
        device: "cpu", "cuda" or "auto" (cuda if there is a GPU).

    Raises:
        ValueError: A value is out of range.
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
