"""Data-parallel training in several processes: each takes its share of every batch, and gradients are all-reduced.

Start them with ``torchrun --nproc-per-node N -m metacontroller.cli pretrain RUN ...`` (or ``accelerate launch``). In
pretraining and discovery every process generates the whole batch and keeps its rows, so batches, noise and, up to
rounding, losses do not depend on the number of processes. In RL every process plays its share of the episodes with an
rng of its own, and the update uses the episodes of all. Only the first process writes files and shows progress.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed

from metacontroller.data.trajectories import Ratio
from metacontroller.ranges import require


class Processes:
    """The processes that train together. rank: index of this one. count: their number, 1 without a launcher."""

    def __init__(self, device_type: str) -> None:
        self.rank, self.count, self.device = 0, 1, torch.device(device_type)
        if launched():
            if device_type == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            if not distributed.is_initialized():
                distributed.init_process_group("nccl" if device_type == "cuda" else "gloo")
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def rows(self, batch: int) -> Tensor | None:
        """Indices of this process's rows of a batch, int64; None for all. UserError if there are too few rows."""
        if self.count == 1:
            return None
        require(batch >= self.count, "batch_size", batch, f"at least {self.count}, one episode a process")
        return torch.arange(self.rank, batch, self.count)

    def share(self, batch: int, minibatches: int) -> int:
        """Episodes of a batch that this process plays; UserError unless they divide into ``minibatches``."""
        shares = self.count * minibatches
        require(batch % shares == 0, "batch_size", batch, f"a multiple of {shares}, processes times minibatches")
        return batch // self.count

    def own_generator(self, shared: torch.Generator) -> torch.Generator:
        """A generator of this process alone, seeded from ``shared``, whose state stays the same in all processes.

        With one process it is ``shared`` itself.
        """
        if self.count == 1:
            return shared
        seeds = torch.randint(2**62, (self.count,), generator=shared, device=shared.device)
        return torch.Generator(shared.device).manual_seed(int(seeds[self.rank]))

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, the same list in all of them; a tensor may differ in size, not in its device."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        if not isinstance(value, Tensor):
            distributed.all_gather_object(values, value)
            return values
        distributed.all_gather_object(values, value.cpu())
        return [part.to(value.device) for part in values]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, in place, by its sum over the processes; one exchange for all of them."""
        if self.count == 1 or not tensors:
            return
        total = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(total)
        for tensor, value in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(value.view_as(tensor))

    def mean(self, ratio: Ratio) -> Tensor:
        """The mean over all processes, whose sums are added before they are divided."""
        sums = Ratio(*(value.detach().clone() for value in ratio))
        self.all_reduce(sums)
        return sums.mean

    def any(self, flag: bool) -> bool:
        """Whether the flag of any process is set; the same in all of them."""
        if self.count == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.device)
        self.all_reduce([flags])
        return bool(flags)

    def wait(self) -> None:
        """Waits until every process has called this."""
        if self.count > 1:
            distributed.barrier()


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@cache
def processes(device_type: str) -> Processes:
    """The processes that train together on a device type ("cpu", "cuda"); one object per type. Call before training."""
    return Processes(device_type)


def leave(status: int = 0) -> None:
    """Ends a process that a launcher started as one of several; returns where there is but one.

    The connection is closed and the process ends at once, without the interpreter's own exit: threads of the connection
    outlive it now and then, and an exit that finds them aborts ("terminate called without an active exception").
    """
    if not launched():
        return
    if status == 0 and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
