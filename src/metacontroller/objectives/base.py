"""The interface of what discovery minimises, and what objectives share.

An objective draws what it needs for a batch, and gives the loss of a batch, or of a process's rows of it. A start, such
as `objectives.guided`, wraps the objective that follows and hands over to it at its last update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Augment, Generate
from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.models.protocol import SteerableModel
from metacontroller.objectives.clips import Decisions
from metacontroller.training.loop import BatchExtras, Metrics

Positions = Callable[[Tensor], Tensor]
"""States (n, t, *obs) -> (n, t, p): where things are as seen from the agent, see `Domain.positions`."""


@runtime_checkable
class Objective(Protocol):
    """What discovery minimises. module: whose weights a checkpoint holds. parameters: those that are trained."""

    module: nn.Module
    parameters: list[nn.Parameter]

    def prepare(self, batch: Trajectories, step: int, generator: torch.Generator) -> BatchExtras:
        """What the loss of a whole batch needs besides, tensors (b, ...): noise, augmented states, codes, clips."""
        ...

    def loss(self, batch: Trajectories, step: int, extras: BatchExtras) -> tuple[Tensor, Metrics]:
        """The loss at update number ``step``, counted from 0, a mean over real steps; metrics, as of `train`."""
        ...


class Setup(NamedTuple):
    """What an objective is made for: a model, what steers it, and a source of episodes.

    augment: symmetry augmentation of what the sequence embedder reads. positions, decisions: of a world, see
    `Domain.positions` and `Domain.decisions`. gate_tolerance: steps within which the metrics take a switch and a change
    of subgoal as the same.
    """

    model: SteerableModel
    meta_controller: MetaController
    generate: Generate
    augment: Augment | None = None
    positions: Positions | None = None
    decisions: Decisions | None = None
    gate_tolerance: int = 1


def share_of(steps: Tensor, batch: Trajectories) -> Tensor:
    """Share of a batch's real steps that ``steps`` (b, t) bool marks, a scalar above 0."""
    return (steps.sum() / batch.lengths.sum()).clamp_min(1e-9)


def mean_over(values: Tensor, steps: Tensor, batch: Trajectories, share: Tensor) -> Tensor:
    """Mean of values (b, t) over ``steps`` (b, t) bool, times a factor that is 1 in a single process.

    `train` weights a process by its share of all real steps of a batch. With ``share``, the `share_of` the whole batch
    (b,), the same for all rows, the sum over processes is the mean over the whole batch.
    """
    return masked_mean(values, steps) * (share_of(steps, batch) / share[0])
