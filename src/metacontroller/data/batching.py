"""Endless batches of episodes of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metacontroller.data.trajectories import Trajectories, with_finite_padding
from metacontroller.errors import UserError
from metacontroller.ranges import Rows, check

Generate = Callable[[int, torch.Generator], Trajectories]
"""A source of behaviour: ``generate(n, generator)`` returns n episodes, generated or sampled from a dataset."""

VALIDATION_BIT = 2**31
"""In the seed of every validation stream, see `apart`."""


def apart(generator: torch.Generator) -> torch.Generator:
    """A generator for validation episodes, seeded by a draw of this one, on its device.

    No phase trains on its stream: phases draw episodes from seeds below this bit, and their noise, fits and clips from
    seeds with it that are no multiples of 8, see `training.seeding`.
    """
    draw = int(torch.randint(2**28, (), generator=generator, device=generator.device))
    return torch.Generator(generator.device).manual_seed(VALIDATION_BIT | 8 * draw)


Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Symmetry augmentation: states (b, t, ...) and a generator -> states of the same shape."""


class EpisodeStream:
    """Endless batches of episodes of similar length, whose position can be saved and restored exactly.

    It asks ``generate`` for a window of ``window * batch_size`` episodes at a time and sorts it into batches by length.
    ``generate`` gets a generator on ``device``, so that it can generate its episodes there.
    """

    def __init__(
        self, generate: Generate, batch_size: int, seed: int, window: int = 8, device: torch.device | str = "cpu"
    ) -> None:
        self.generate, self.batch_size, self.window = generate, batch_size, window
        self.generator = torch.Generator(device).manual_seed(seed)
        self.window_start = self.generator.get_state()
        self.used = window
        self.batches: list[Trajectories] = []

    def next(self) -> Trajectories:
        """The next batch."""
        if self.used == self.window:
            self._open_window()
        self.used += 1
        return self.batches[self.used - 1]

    def tensors(self) -> dict[str, Tensor]:
        """The position in the stream, for ``restore``."""
        return {"stream.window": self.window_start.clone(), "stream.used": torch.tensor(self.used)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Returns to the position at which ``tensors()`` was called."""
        self.generator.set_state(tensors["stream.window"].cpu())
        self._open_window()
        self.used = int(tensors["stream.used"])

    def _open_window(self) -> None:
        self.window_start = self.generator.get_state()
        episodes = with_finite_padding(self.generate(self.window * self.batch_size, self.generator))
        self.batches = list(length_sorted_batches(episodes, self.batch_size, self.generator))
        self.used = 0


def length_sorted_batches(
    trajectories: Trajectories, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[Trajectories]:
    """Batches of episodes of similar length, in random order, so that little of a batch is padding.

    Yields ``len // batch_size`` batches. Episodes that do not fill a batch are left out; which ones is random at each
    call. UserError if there are fewer episodes than ``batch_size``.
    """
    check("batch_size", batch_size, Rows)
    check("trajectories", trajectories, Trajectories)
    count = trajectories.batch // batch_size
    if count == 0:
        raise UserError(f"batch_size {batch_size} is larger than the {trajectories.batch} episodes at hand; lower it.")
    device = generator.device if generator is not None else torch.device("cpu")
    rows = torch.randperm(trajectories.batch, generator=generator, device=device)[: count * batch_size]
    lengths = trajectories.lengths.to(device)
    by_length = rows[torch.argsort(lengths[rows], stable=True)].view(count, batch_size)
    for index in torch.randperm(count, generator=generator, device=device).tolist():
        yield trajectories.index(by_length[index].to(trajectories.lengths.device))
