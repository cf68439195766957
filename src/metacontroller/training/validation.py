"""The action loss on episodes that a phase does not train on, beside that in training.

Nothing of training depends on it: it has random numbers of its own, and runs in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from metacontroller.data.batching import Generate
from metacontroller.data.trajectories import Trajectories, with_finite_padding
from metacontroller.training.seeding import noise_generator

JUDGED = 32
"""Episodes of each kind by which it is judged, at the end, whether the losses part; at most."""
STANDARD_ERRORS, SHARE, NATS = 2.0, 0.1, 0.01
"""They part where the loss on validation episodes is higher by more than so many standard errors of the difference,
and so large a share of the loss in training and so many nats a step besides."""

ActionLoss = Callable[[Trajectories, torch.Generator], Tensor]
"""The mean action loss over the steps of a batch, nats a step; the generator: of its noise."""


class Validation:
    """Validation episodes, drawn once. module: what is trained."""

    def __init__(
        self, validation: Generate, batch_size: int, seed: int, module: nn.Module, action_loss: ActionLoss
    ) -> None:
        self.module, self.action_loss, self.seed = module, action_loss, seed
        self.device = next(module.parameters()).device
        self.episodes = self._drawn(validation, batch_size)

    def loss(self) -> float:
        """The action loss on them."""
        with _judging(self.module):
            return self._loss(self.episodes)

    def compared(self, generate: Generate) -> tuple[str, bool]:
        """One line with the losses on as many episodes of ``generate``, which is trained on, and of validation; and
        whether they part, which they cannot where there are fewer than two different episodes of a kind."""
        trained_on = self._drawn(generate, self.episodes.batch)
        with _judging(self.module):
            (mean, error, count), (other, other_error, others) = map(self._mean, (trained_on, self.episodes))
        noise = STANDARD_ERRORS * (error**2 + other_error**2) ** 0.5
        text = f"action loss {mean:.4g} on {count} episodes of training, {other:.4g} on {others} held out"
        return text, self.episodes.batch > 1 and other - mean > noise + SHARE * abs(mean) + NATS

    def _drawn(self, source: Generate, count: int) -> Trajectories:
        generator = noise_generator(self.seed, self.device)
        return with_finite_padding(source(count, generator)).to(self.device)

    def _loss(self, episodes: Trajectories) -> float:
        return float(self.action_loss(episodes, noise_generator(self.seed, self.device)))

    def _mean(self, episodes: Trajectories) -> tuple[float, float, int]:
        """Of the first different episodes: the mean over all steps from each one's mean, its standard error, which is
        infinite for one episode, and their number."""
        rows = _different(episodes)[:JUDGED]
        losses = torch.tensor([self._loss(episodes.index(row)) for row in rows.split(1)], dtype=torch.float64)
        steps = episodes.lengths[rows].cpu().double()
        mean = (losses * steps).sum() / steps.sum()
        spread = ((losses - mean) * steps / steps.mean()).square().sum() / max(len(losses) - 1, 1)
        error = float((spread / len(losses)).sqrt()) if len(losses) > 1 else float("inf")
        return float(mean), error, len(losses)


def _different(episodes: Trajectories) -> Tensor:
    """Indices of the episodes that no earlier one equals in states and actions."""
    seen, rows = set(), []
    for row in range(episodes.batch):
        parts = (value[row].cpu().numpy().tobytes() for value in (episodes.states, episodes.actions, episodes.lengths))
        if (content := b"".join(parts)) not in seen:
            seen.add(content)
            rows.append(row)
    return torch.tensor(rows, device=episodes.lengths.device)


@contextmanager
def _judging(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each part returns to the mode in which it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
