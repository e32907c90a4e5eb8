"""Distributed training: processes started by torchrun, sharded weights, and signals."""

from __future__ import annotations

import datetime
import gc
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import UserError

if TYPE_CHECKING:
    from .config import TrainConfig


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Pseudo signal number for the end of max_seconds.
TIME_UP = -1


class Interrupted(Exception):
    """A signal stopped the run; its state is in a checkpoint.

    Attributes:
        step: Steps done.
        signal: Number of the signal.
    """

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.signal = step, number


@contextmanager
def processes(config: TrainConfig) -> Iterator[torch.device]:
    """Join the process group if torchrun started this process, and yield the device."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UserError("optimisation.device is cuda, but there is no CUDA device; set it to cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch % world:
        raise UserError(
            f"optimisation.batch must be a multiple of the number of processes, {world}, got {config.batch}"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield device
        return
    # Long timeout: the first process encodes the videos while the others wait.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12))
    try:
        try:
            yield device
        except Interrupted as stop:
            traceback.clear_frames(stop.__traceback__)
            _part()
            raise
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise UserError("another process of this run has failed; see its message") from error
        _part()
    finally:
        dist.destroy_process_group()


def _part() -> None:
    """Wait for the other processes, after freeing all objects that refer to the process group.

    gloo sometimes aborts at exit if a sharded model still exists.
    """
    gc.collect()
    dist.barrier()


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_then_others(work: Callable[[], Any]) -> Any:
    """Call a function in the first process, then in the others, which find the files that it wrote."""
    made = work() if rank() == 0 else None
    if dist.is_initialized():
        dist.barrier()
    return made if rank() == 0 else work()


def shard(objective: nn.Module, device: torch.device) -> nn.Module:
    """Shard weights, gradients and moments over the processes (FSDP2), if there are several."""
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # Weights outside of these parts are gathered for the whole step, such as the patch embedding, which the memory
        # encoders call, too.
        for part in (*objective.parts(), objective):
            fully_shard(part, mesh=mesh)
    return objective


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a weight."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a weight that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_as(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The local shard of a tensor that all processes have, sharded like another one."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def agree(loss: torch.Tensor, stop: list[int], world: int) -> tuple[torch.Tensor, int]:
    """Mean loss of all processes, and the signal that stops any of them: all must stop at the same step."""
    if world == 1:
        return loss, stop[-1] if stop else 0
    numbers = (*STOPS, TIME_UP)
    came = torch.tensor([float(number in stop) for number in numbers], device=loss.device)
    both = torch.cat([(loss / world).view(1), came])
    dist.all_reduce(both)
    return both[0], next((number for number, count in zip(numbers, both[1:].tolist(), strict=True) if count), 0)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect signals, so that a run stops after the current step; a second signal, more than 1 s later, kills it.

    SIGHUP stays ignored if it was, as under nohup.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}
    first = 0.0

    def note(number: int, _: object) -> None:
        nonlocal first
        if not caught:
            caught.append(number)
            first = time.monotonic()
        # torchrun forwards a signal that the terminal has already sent to every process.
        elif time.monotonic() - first > 1.0:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    try:
        for number in STOPS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            before[number] = signal.signal(number, note) or signal.SIG_DFL
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
