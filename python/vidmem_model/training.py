"""The training loop of both stages: flow matching, AdamW or Muon, moving average, checkpoints, exact resume.

Every random number comes from a generator seeded by (seed, step, sample), so that a resumed run, or one
with another number of processes, takes exactly the same samples.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from . import checkpoint
from .checks import MOST_SEED, Checked, OneOf, not_negative, positive, show, within
from .curve import Curve, progress, read_curve, write_curve_plot
from .dataset import DataConfig, Latents, Rate, prepare
from .distributed import Interrupted, agree, first_then_others, full, local, rank, shard, signals
from .errors import UserError
from .flow import interpolate, velocity_loss
from .linear_start import is_fitted
from .model import VAE_FILE, MemoryModel, save_model
from .model_config import ModelConfig
from .muon import Muon
from .report import plots_missing, replacing
from .vae import VideoCodec

CURVE = "curve.csv"
# A run may go on with other values of these.
_FREE = ("checkpoint_every", "log_every", "threads", "device", "output", "cache")


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
        warmup: steps over which the learning rate rises from zero.
        schedule: "cosine" (down to a hundredth) or "constant".
        weight_decay: of matrices; norms, biases and tables have none.
        clip_norm: largest norm of the gradient.
        ema_decay: of the moving average of the weights, which is what is saved in the end.
        seed: of the initial weights and of all samples.
        precision: "float32", "bfloat16" by autocast, or "auto": bfloat16 where the device multiplies it in
            hardware. Where it does not, a product in bfloat16 can take a hundred times as long.
        checkpoint_every, log_every: in steps.
        threads: of the CPU; null leaves them as they are.
        device: "cpu", "cuda", or "auto".

    Raises:
        ValueError: a value is out of range.
    """

    steps: Annotated[int, positive(1_000_000_000)] = 10_000
    batch: Annotated[int, positive(65_536)] = 8
    lr: Annotated[float, positive(1e6)] = 3e-4
    muon_lr: Annotated[float, not_negative(1e6)] = 0.0
    fitted_lr: Annotated[float, not_negative(1e6)] = 1.0
    warmup: Annotated[int, not_negative(1_000_000_000)] = 200
    schedule: Annotated[str, OneOf("cosine", "constant")] = "cosine"
    weight_decay: Annotated[float, not_negative(1e6)] = 0.01
    clip_norm: Annotated[float, positive(1e9)] = 1.0
    ema_decay: Annotated[float, within(0, 1, below=True)] = 0.999
    seed: Annotated[int, not_negative(MOST_SEED)] = 0
    precision: Annotated[str, OneOf("float32", "bfloat16", "auto")] = "float32"
    checkpoint_every: Annotated[int, positive(1_000_000_000)] = 500
    log_every: Annotated[int, positive(1_000_000_000)] = 50
    threads: Annotated[int | None, positive(4096)] = None
    device: Annotated[str, OneOf("auto", "cpu", "cuda")] = "auto"


class Batch(NamedTuple):
    """Samples of one step; B samples, latents (B, C, frames, H, W).

    Attributes:
        history: what the memory encoders see.
        lows: for each encoder its low-resolution latents, or None.
        target: frames to be made.
        noise: of the size of `target`.
        t: (B,) times in (0, 1).
        frames: (B, K) positions of the targets, in latent frames from the history's start.
        prompts: B texts.
        window, window_frames: clean frames beside the memory and their positions, or None.
    """

    history: torch.Tensor
    lows: list[torch.Tensor | None]
    target: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    frames: torch.Tensor
    prompts: list[str]
    window: torch.Tensor | None = None
    window_frames: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=True)
            return [move(v) for v in value] if isinstance(value, list) else value

        return Batch(*map(move, self))


class FlowMatching(nn.Module):
    """The loss of both stages, as one module: FSDP gathers its weights for one forward.

    Args:
        model: what is trained.
    """

    def __init__(self, model: MemoryModel) -> None:
        super().__init__()
        self.model = model

    def parts(self) -> list[nn.Module]:
        """Modules whose weights are gathered one at a time."""
        return [*self.model.dit.blocks, *self.model.encoders]

    def forward(self, batch: Batch) -> torch.Tensor:
        """Mean squared error of the predicted velocity, a float32 scalar."""
        memory = self.model.remember(batch.history, batch.lows)
        noisy = interpolate(batch.target, batch.noise, batch.t)
        given = {"frames": batch.frames, "window": batch.window, "window_frames": batch.window_frames}
        velocity = self.model.predict(noisy, batch.t, batch.prompts, memory=memory, **given)
        return velocity_loss(velocity, batch.target, batch.noise).mean()


def schedule(config: TrainConfig, step: int) -> float:
    """Learning rate of step number `step`, from 0, as a share of its peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


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
    """Train a model, going on from the last checkpoint if there is one.

    Writes checkpoints/, curve.csv and, with matplotlib, curve.png to `folder`.

    Args:
        build: makes the model before its first step, the same in every call and process; weights
            without gradient stay as they are.
        batches: function of the step and of the numbers of the samples in the batch.
        config: how to optimise.
        folder: of the run.
        settings: JSON of all that must be the same for a run to go on.
        device: of this process.
        restart: forget an earlier run in this folder.
        objective_of: makes the module whose output for a batch is the loss; it has the attribute
            `model` and says by `parts` what FSDP shards apart. By default FlowMatching.

    Returns:
        A model with the moving average of the weights, on the CPU.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
        UserError: the folder holds a run with other settings, or cannot be written.
    """
    torch.manual_seed(config.seed)
    objective = shard((objective_of or FlowMatching)(build()).to(device).train(), device)
    trained = {name: p for name, p in objective.model.named_parameters() if p.requires_grad}
    dtype = _dtype(config, device)
    optimizers = _optimizers(trained, config, dtype)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    ema = {name: p.detach().clone() for name, p in trained.items()}
    state = checkpoint.training_state(trained, ema, optimizers)
    done = _resume(folder, state, settings, restart)

    averages, weights = [local(ema[name]) for name in trained], [local(p) for p in trained.values()]
    world = dist.get_world_size() if dist.is_initialized() else 1
    share = config.batch // world
    samples = range(rank() * share, (rank() + 1) * share)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    curve = Curve(folder / CURVE, done) if rank() == 0 else None
    with signals() as stop, progress(config.steps, done, rank() == 0) as tell:
        for step in range(done, config.steps):
            began = time.perf_counter()
            share_of_peak = schedule(config, step)
            for group in groups:
                group["lr"] = share_of_peak * group["peak"]
            batch = batches(step, samples).to(device)
            with amp:
                loss = objective(batch)
            loss.backward()
            norm = full(nn.utils.clip_grad_norm_(trained.values(), config.clip_norm))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            decay = min(config.ema_decay, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - decay)
            mean, stopped = agree(loss.detach(), stop, world)
            at = step + 1
            if curve:
                curve.add(at, mean, norm, config.lr * share_of_peak, time.perf_counter() - began)
            keeps = at % config.checkpoint_every == 0 or at == config.steps or stopped
            if curve and (keeps or at % config.log_every == 0):
                tell(at, *curve.flush())
            if keeps:
                checkpoint.save(folder / "checkpoints", at, state, settings)
            if stopped and at < config.steps:
                raise Interrupted(at, stopped)

    if curve and plots_missing() is None:
        write_curve_plot(folder / "curve.png", read_curve(folder / CURVE))
    torch.manual_seed(config.seed)
    final = build()
    final.load_state_dict({name: full(value).cpu() for name, value in ema.items()}, strict=False)
    return final


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of the products of a training."""
    if config.precision != "auto":
        return getattr(torch, config.precision)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
        fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's
    return torch.bfloat16 if fast else torch.float32


def _optimizers(
    trained: dict[str, nn.Parameter], config: TrainConfig, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon if it has a learning rate; a group's "peak" is that of its learning rate."""
    if not trained:
        raise ValueError("fit: the model must have weights that require a gradient, got none")
    matrices = {n: p for n, p in trained.items() if config.muon_lr and ".blocks." in n and p.ndim == 2}
    # What reads the prompt learns from few tokens, and orthogonalising it would be a fifth of Muon's time.
    matrices = {n: p for n, p in matrices.items() if "table" not in n and ".text_" not in n}
    # Vectors are norms and biases; tables (adaLN, places) are sums of them.
    decays = {name: p.ndim >= 2 and "table" not in name and "places" not in name for name, p in trained.items()}
    rest = {n: p for n, p in trained.items() if n not in matrices}
    shares = {name: config.fitted_lr if is_fitted(name) else 1.0 for name in rest}
    groups = [
        {
            "params": [p for n, p in rest.items() if (shares[n], decays[n]) == (share, decay)],
            "weight_decay": config.weight_decay if decay else 0.0,
            "lr": config.lr * share,
        }
        for share in sorted(set(shares.values()), reverse=True)
        for decay in (True, False)
    ]
    made = [torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99), fused=True)]
    if matrices:
        made.append(Muon(matrices.values(), config.muon_lr, config.weight_decay, dtype=dtype))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def _resume(folder: Path, state: dict[str, torch.Tensor], settings: dict[str, Any], restart: bool) -> int:
    """Load the last checkpoint into `state`, if there is one; the step to go on from."""
    checkpoints = folder / "checkpoints"
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if restart:
                shutil.rmtree(checkpoints, ignore_errors=True)
                (folder / CURVE).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror or error}); choose another output"
            ) from error
    if dist.is_initialized():
        dist.barrier()
    last = checkpoint.newest(checkpoints)
    if last is None:
        return 0
    defaults = settings.defaults if isinstance(settings, Settings) else {}
    before = defaults | _flat(checkpoint.settings_of(last))  # keys that are newer than the run
    now = _flat(settings)
    for key in sorted(now.keys() | before.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            raise UserError(
                f"{folder}: holds a run with {key} {show(old)}, now it is {show(new)}; "
                "choose another output or --restart"
            )
    return checkpoint.load(last, state)


class Settings(dict[str, Any]):
    """Settings of a run by dotted key, as JSON holds them.

    Attributes:
        defaults: of the same keys, where they have any.
    """

    def __init__(self, values: dict[str, Any], defaults: dict[str, Any]) -> None:
        super().__init__(values)
        self.defaults = defaults


def run_settings(config: Any) -> Settings:
    """Flatten a configuration to dotted keys, without those that may change from run to run."""
    values = _dotted(dataclasses.asdict(config), "")
    free = {key for key in values if key.rpartition(".")[2] in _FREE}
    return Settings(
        {key: _plain(value) for key, value in values.items() if key not in free},
        {key: _plain(value) for key, value in _defaults(config, "") if key not in free},
    )


def _dotted(value: dict[str, Any], where: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        place = f"{where}.{key}".lstrip(".")
        flat |= _dotted(inner, place) if isinstance(inner, dict) else {place: inner}
    return flat


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with lists of mappings, those of the encoders, taken apart."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        whole = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
        flat |= _dotted({f"{key}[{i}]": each for i, each in enumerate(value)}, "") if whole else {key: value}
    return flat


def _defaults(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Defaults of all fields of a configuration and of the ones inside it."""
    for field in dataclasses.fields(config):
        value, place = getattr(config, field.name), f"{where}.{field.name}".lstrip(".")
        inside = {place: value}
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            inside = {f"{place}[{i}]": each for i, each in enumerate(value)}
        for name, each in inside.items():
            if dataclasses.is_dataclass(each):
                yield from _defaults(each, name)
            elif field.default is not dataclasses.MISSING:
                yield name, field.default


def _plain(value: Any) -> Any:
    """What JSON gives back for it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def prepare_latents(config: DataConfig, model: ModelConfig, vae: VideoCodec, rates: Sequence[Rate]) -> Latents:
    """Encode the films in the first process, with progress on stderr, and read the latents in all."""
    from .cli.options import progress_bar

    with progress_bar() as tell:
        latents = first_then_others(lambda: prepare(config, model, vae, rates, tell))
    if rank() == 0:
        scenes = sum(block.scenes for block in latents.blocks)
        seconds = sum(b.latents.shape[1] for b in latents.blocks) * latents.seconds_per_latent
        test = len(latents.split("test").blocks)
        print(
            f"{len(latents.blocks)} blocks of {scenes} scenes, {seconds:.0f} s of video, {test} blocks for testing",
            file=sys.stderr,
        )
    return latents


def run_extra(output: Path, config: Any) -> dict[str, Any]:
    """What a trained model's file says of its training: configuration, steps and last loss."""
    last = read_curve(output / CURVE)[-1]
    return {"training": _plain(dataclasses.asdict(config)), "steps": last["step"], "loss": last["loss"]}


def finish(output: Path, model: MemoryModel, config: Any, vae: str | Path | None) -> Path | None:
    """Write the trained model, its configuration beside it, and the VAE's weights, in the first process."""
    if rank() != 0:
        return None
    file = save_model(output, model, run_extra(output, config))
    if vae is not None and Path(vae).is_file():
        with replacing(file.with_name(VAE_FILE)) as part:
            shutil.copyfile(vae, part)
    return file
