"""Endless batches of episodes of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from metacontroller.data.trajectories import Trajectories
from metacontroller.errors import UserError

Generate = Callable[[int, torch.Generator], Trajectories]
"""A source of behaviour: ``generate(n, generator)`` returns n fresh (or drawn) episodes."""


class EpisodeStream:
    """Endless length-sorted batches from a source, in windows; its position can be saved and restored exactly.

    The source is given random numbers of ``device`` and so can make its episodes there.
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
        """What ``restore`` needs."""
        return {"stream.window": self.window_start.clone(), "stream.used": torch.tensor(self.used)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on exactly where ``tensors`` were taken."""
        self.generator.set_state(tensors["stream.window"].cpu())
        self._open_window()
        self.used = int(tensors["stream.used"])

    def _open_window(self) -> None:
        self.window_start = self.generator.get_state()
        episodes = self.generate(self.window * self.batch_size, self.generator)
        self.batches = list(length_sorted_batches(episodes, self.batch_size, self.generator))
        self.used = 0


def length_sorted_batches(
    trajectories: Trajectories, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[Trajectories]:
    """Batches of episodes of similar length, in random order, so that little of a batch is padding.

    Yields ``len // batch_size`` batches; episodes that do not fill a batch are left out, drawn afresh at each call.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected at least 1.")
    count = trajectories.batch // batch_size
    if count == 0:
        raise UserError(f"batch_size {batch_size} is larger than the {trajectories.batch} episodes at hand; lower it.")
    device = generator.device if generator is not None else torch.device("cpu")
    kept = torch.randperm(trajectories.batch, generator=generator, device=device)[: count * batch_size]
    lengths = trajectories.lengths.to(device)
    by_length = kept[torch.argsort(lengths[kept], stable=True)].view(count, batch_size)
    for index in torch.randperm(count, generator=generator, device=device).tolist():
        yield trajectories.index(by_length[index].to(trajectories.lengths.device))


Augment = Callable[[Tensor, torch.Generator], Tensor]
"""states (b, t, ...) and a source of randomness -> states of the same shape."""
