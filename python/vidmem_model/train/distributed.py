"""The processes of a training: those that torchrun started, what each holds of the weights, and signals to them."""

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
# Stands beside those signals where the seconds of a run are over; no signal has this number.
TIME_UP = -1


class Interrupted(Exception):
    """The user stopped the run; a checkpoint holds all that was done.

    Attributes:
        step: steps done.
        signal: that stopped it.
    """

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.signal = step, number


@contextmanager
def processes(config: TrainConfig) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and give this one's device."""
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UserError("optimisation.device is cuda, but there is no CUDA device; take cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch % world:
        raise UserError(f"optimisation.batch must be a multiple of the {world} processes, got {config.batch}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield device
        return
    # The first process encodes the films while the others wait.
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
            raise UserError("another process of this run has ended; its own message says why") from error
        _part()
    finally:
        dist.destroy_process_group()


def _part() -> None:
    """Wait for the other processes, with nothing left that refers to the group of them.

    A sharded model that lives on until the interpreter ends makes gloo abort there, now and then.
    """
    gc.collect()
    dist.barrier()


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_then_others(work: Callable[[], Any]) -> Any:
    """Do something in the first process, then in the others, which find its files."""
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
        # What is outside of these is gathered for the whole step: the first projection, which the
        # memory encoders call too, is among it.
        for part in (*objective.parts(), objective):
            fully_shard(part, mesh=mesh)
    return objective


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a weight."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a weight that may be sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_as(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all processes have, sharded as another one is."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def agree(loss: torch.Tensor, stop: list[int], world: int) -> tuple[torch.Tensor, int]:
    """Mean loss of all processes, and what is to stop any of them, a signal first: all must stop at one step."""
    if world == 1:
        return loss, stop[-1] if stop else 0
    numbers = (*STOPS, TIME_UP)
    came = torch.tensor([float(number in stop) for number in numbers], device=loss.device)
    both = torch.cat([(loss / world).view(1), came])
    dist.all_reduce(both)
    return both[0], next((number for number, count in zip(numbers, both[1:].tolist(), strict=True) if count), 0)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect signals that end a run instead of dying in the middle of a step; a second one, later, kills.

    SIGHUP is left alone where it is ignored, as nohup does.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}
    first = 0.0

    def note(number: int, _: object) -> None:
        nonlocal first
        if not caught:
            caught.append(number)
            first = time.monotonic()
        # torchrun sends on what the terminal has sent to every process already.
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
