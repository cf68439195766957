"""Training in several processes at once: each takes its share of every batch, and their gradients are added up.

Start them with ``torchrun --nproc-per-node N -m metacontroller.cli pretrain RUN ...`` (or ``accelerate launch``). In
pretraining and discovery a batch is the same whatever the number of processes, random numbers included, and so are the
losses, up to rounding: every process draws the whole batch and keeps its rows. In RL every process plays its share of
the episodes with random numbers of its own, and the update is that of all of them. Only the first process writes files
and shows progress.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from metacontroller.errors import UserError


class Processes:
    """The processes that train together. rank: of this one. count: of all, 1 where nothing was launched."""

    def __init__(self, device_type: str) -> None:
        self.rank, self.count = 0, 1
        if launched():
            from accelerate import PartialState  # takes half a second to import, which one process need not wait for

            self.state = PartialState(cpu=device_type == "cpu")
            self.rank, self.count = self.state.process_index, self.state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def rows(self, batch: int) -> Tensor | None:
        """This process's rows of a batch, int64; None for all of them."""
        if self.count == 1:
            return None
        if batch < self.count:
            raise UserError(f"batch_size is {batch}; expected at least {self.count}, one episode a process.")
        return torch.arange(self.rank, batch, self.count)

    def share(self, batch: int, minibatches: int) -> int:
        """How many of a batch's episodes this process plays, a multiple of ``minibatches``."""
        shares = self.count * minibatches
        if batch % shares:
            raise UserError(f"batch_size is {batch}; expected a multiple of {shares}, processes times minibatches.")
        return batch // self.count

    def own_generator(self, shared: torch.Generator) -> torch.Generator:
        """Random numbers of this process alone; ``shared``, which goes on alike in all, where there is but one."""
        if self.count == 1:
            return shared
        seeds = torch.randint(2**62, (self.count,), generator=shared, device=shared.device)
        return torch.Generator(shared.device).manual_seed(int(seeds[self.rank]))

    def gather(self, values: Tensor) -> Tensor:
        """(b,) of each process -> (count, b), the same in all."""
        if self.count == 1:
            return values[None]
        from accelerate.utils import gather

        return gather(values).view(self.count, -1)  # pyright: ignore[reportAttributeAccessIssue]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, in place, by its sum over the processes; one exchange for all of them."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        total = reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "sum")
        parts = total.split([tensor.numel() for tensor in tensors])  # pyright: ignore[reportAttributeAccessIssue]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Returns once every process is here."""
        if self.count > 1:
            self.state.wait_for_everyone()


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@cache
def processes(device_type: str) -> Processes:
    """The processes that train together on devices of a type ("cpu", "cuda"); made once, before tensors are."""
    return Processes(device_type)


def leave() -> None:
    """Ends the connection between processes, when each has done its work; a process that just exits may be aborted."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
