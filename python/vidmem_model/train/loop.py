"""The training loop of all stages: flow matching, AdamW and Muon, EMA, checkpoints, exact resume.

Every random number comes from a generator seeded by (seed, step, sample), so that a resumed run, or one with another
number of processes, uses exactly the same samples.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..checks import show
from ..errors import UserError
from ..files import cannot_write, write_json
from ..model.encoder import History
from ..model.flow import interpolate, velocity_loss
from ..model.memory_model import MemoryModel
from ..model.text import Words
from ..progress import progress
from ..show.curve import write_curve_plot
from ..show.plots import plots_missing
from . import checkpoint
from .ahead import ahead
from .config import TrainConfig
from .curve import Curve, read_curve
from .distributed import TIME_UP, Interrupted, agree, full, local, rank, shard, signals
from .optimizers import optimizers
from .run import CURVE, PLOT, SPEED, as_now, flat
from .speed import Speed
from .step import CapturedPass, Pass, change_tensors


class Batch(NamedTuple):
    """The B samples of a step.

    Attributes:
        history: Input of the memory encoders.
        target: (B, C, K, H, W), latent frames to denoise.
        noise: (B, C, K, H, W).
        t: (B,), timesteps in (0, 1).
        frames: (B, K), positions of the targets, in latent frames from the start of the history.
        prompts: B prompts, or their word ids.
        window: (B, C, W, H, W'), clean frames beside the memory, or None.
        window_frames: (B, W), positions of these, or None.
    """

    history: History
    target: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    frames: torch.Tensor
    prompts: list[str] | Words
    window: torch.Tensor | None = None
    window_frames: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return change_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


class FlowMatching(nn.Module):
    """The loss of Stage I and Stage II, as one module, so that FSDP gathers weights once per forward.

    Args:
        model: Model to train.
    """

    def __init__(self, model: MemoryModel) -> None:
        super().__init__()
        self.model = model

    def parts(self) -> list[nn.Module]:
        """Modules whose weights FSDP gathers one at a time."""
        return [*self.model.dit.blocks, *self.model.encoders]

    def fixed(self, batch: Batch) -> Batch:
        """Replace prompts by tensors whose shapes do not depend on the prompts, for CUDA graphs."""
        text = self.model.text
        if text.config.kind != "words":
            raise UserError("optimisation.cuda_graph requires model.text.kind words; set it to false")
        return batch._replace(prompts=text.cut(batch.prompts, text.config.max_tokens))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Mean squared error of the predicted velocity, a float32 scalar."""
        memory = self.model.remember(batch.history)
        noisy = interpolate(batch.target, batch.noise, batch.t)
        given = {"frames": batch.frames, "window": batch.window, "window_frames": batch.window_frames}
        velocity = self.model.predict(noisy, batch.t, batch.prompts, memory=memory, **given)
        return velocity_loss(velocity, batch.target, batch.noise).mean()


def schedule(config: TrainConfig, step: int, first: int = 0) -> float:
    """Learning rate of a step, relative to the peak.

    Args:
        config: Configuration of the optimisation.
        step: Number of the step, from 0.
        first: Step at which the optimizers started without moments; the warmup starts there.
    """
    since = step - first
    rise = (since + 1) / config.warmup_steps if since < config.warmup_steps else 1.0
    if step < config.warmup_steps or config.schedule == "constant":
        return rise
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def fit(
    build: Callable[[], nn.Module],
    batches: Callable[[int, Sequence[int]], Any],
    config: TrainConfig,
    folder: Path,
    settings: dict[str, Any],
    device: torch.device,
    restart: bool = False,
    objective_of: Callable[[Any], nn.Module] | None = None,
) -> Any:
    """Train a model, resuming from the last checkpoint if there is one.

    Writes checkpoints/, curve.csv, speed.json and, with matplotlib, curve.png to `folder`. Without a checkpoint it
    resumes from weights and step of another machine, if `checkpoint.begin_with` stored them.

    Args:
        build: Makes the initial model, the same in every call and process; weights without gradient stay frozen.
        batches: Function (step, sample numbers) -> batch.
        config: Configuration of the optimisation.
        folder: Output folder of the run.
        settings: Settings, as JSON values, that must be the same to resume the run.
        device: Device of this process.
        restart: Discard an earlier run in the folder.
        objective_of: Makes the module whose output for a batch is the loss. It has an attribute `model`, a method
            `parts` (modules that FSDP shards separately) and a method `fixed` (prepares batches for a CUDA graph). By
            default FlowMatching.

    Returns:
        The model with the EMA of the weights, on the CPU.

    Raises:
        Interrupted: A signal stopped the run; a checkpoint was written.
        UserError: The folder holds a run with other settings, or cannot be written.
    """
    torch.manual_seed(config.seed)
    model = build()
    final = copy.deepcopy(
        model
    )  # copied now, because another call of build might take minutes (a linear start reads the videos)
    objective = shard((objective_of or FlowMatching)(model).to(device).train(), device)
    trained = {name: p for name, p in objective.model.named_parameters() if p.requires_grad}
    dtype = _dtype(config, device)
    used = optimizers(objective.model, config, dtype)
    groups = [group for optimizer in used for group in optimizer.param_groups]
    ema = {name: p.detach().clone() for name, p in trained.items()}
    state = checkpoint.training_state(trained, ema, used)
    done = _resume(folder, state, settings, restart)
    first = checkpoint.first_step(folder / "checkpoints")

    averages, weights = [local(ema[name]) for name in trained], [local(p) for p in trained.values()]
    world = dist.get_world_size() if dist.is_initialized() else 1
    share = config.batch // world
    samples = range(rank() * share, (rank() + 1) * share)
    run = _pass(objective, config, dtype, device)

    def draw(step: int) -> Any:
        batch = batches(step, samples)
        if run.captures:
            batch = objective.fixed(batch)
        return change_tensors(batch, torch.Tensor.pin_memory) if device.type == "cuda" else batch

    curve = Curve(folder / CURVE, done) if rank() == 0 else None
    speed = Speed(device, done, run)
    deadline = time.monotonic() + (math.inf if config.max_seconds is None else config.max_seconds)
    steps = range(done, config.steps)
    with (
        signals() as stop,
        progress(config.steps, done, rank() == 0) as tell,
        ahead(draw, steps, config.draw_ahead) as drawn,
    ):
        began = time.perf_counter()
        for step, batch in zip(steps, drawn, strict=True):
            share_of_peak = schedule(config, step, first)
            for group in groups:
                group["lr"] = share_of_peak * group["peak"]
            loss = run(batch.to(device))
            norm = full(nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm))
            for optimizer in used:
                optimizer.step()
                optimizer.zero_grad(set_to_none=not config.cuda_graph)
            decay = min(config.ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - decay)
            if time.monotonic() >= deadline and not stop:
                stop.append(TIME_UP)
            mean, stopped = agree(loss, stop, world)
            at = step + 1
            speed.add(at)
            if curve:
                curve.add(at, mean, norm, config.lr * share_of_peak, time.perf_counter() - began)
            keeps = at % config.checkpoint_every == 0 or at == config.steps or stopped
            if curve and (keeps or at % config.log_every == 0):
                tell(at, *curve.flush())
            if keeps:
                checkpoint.save(folder / "checkpoints", at, state, settings)
            if stopped == TIME_UP:
                break
            if stopped and at < config.steps:
                raise Interrupted(at, stopped)
            began = time.perf_counter()

    if curve and (done < config.steps or not (folder / SPEED).exists()):
        write_json(folder / SPEED, speed.result(dtype))
    if curve and plots_missing() is None:
        write_curve_plot(folder / PLOT, read_curve(folder / CURVE))
    final.load_state_dict({name: full(value).cpu() for name, value in ema.items()}, strict=False)
    return final


def _pass(objective: nn.Module, config: TrainConfig, dtype: torch.dtype, device: torch.device) -> Pass:
    """Forward and backward pass of a step, as a CUDA graph if the configuration asks for it."""
    if not config.cuda_graph:
        return Pass(objective, dtype, device)
    if device.type != "cuda" or dist.is_initialized():
        where = "by several processes" if dist.is_initialized() else f"on {device.type}"
        raise UserError(f"optimisation.cuda_graph requires one process with a CUDA device, got a training {where}")
    return CapturedPass(objective, dtype, device)


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Dtype of the matrix products of a training."""
    if config.precision != "auto":
        return getattr(torch, config.precision)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # older torch lacks it
        fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is for ARM
    return torch.bfloat16 if fast else torch.float32


def _resume(folder: Path, state: dict[str, torch.Tensor], settings: dict[str, Any], restart: bool) -> int:
    """Load the last checkpoint, or stored initial weights, into `state`; return the step to resume from."""
    checkpoints = folder / "checkpoints"
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(checkpoints, everything=restart)
            if restart:
                (folder / CURVE).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
    if dist.is_initialized():
        dist.barrier()
    last = checkpoint.newest(checkpoints)
    if last is None:
        return checkpoint.begin(checkpoints, state)
    defaults = getattr(settings, "defaults", {})
    before, now = (
        {**defaults, **each} for each in (as_now(checkpoint.settings_of(last), settings), dict(flat(settings)))
    )
    for key in sorted(before.keys() | now.keys()):
        old, new = (each.get(key, "not set") for each in (before, now))
        if old != new:
            raise UserError(
                f"{folder}: holds a run with {key}={show(old)}, this run has {key}={show(new)}; choose another output, "
                "or --restart to discard it"
            )
    return checkpoint.load(last, state)
