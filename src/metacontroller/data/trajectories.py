"""Behaviour data: padded batches of episodes with lengths, and masks.

Axes: b episodes, t steps. A sequence holds T actions and T + 1 states: ``o_1, a_1, ..., a_T, o_{T+1}`` (paper §1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from metacontroller.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """A padded batch of episodes.

    states: (b, T + 1, ...) observations o_1 .. o_{T+1}; the padding repeats the last one.
    actions: (b, T, ...) actions a_1 .. a_T; zeros in the padding.
    lengths: (b,) int64, number of actions of each episode, 1 <= length <= T.
    subgoals: (b, T) int64 or None, which subgoal each action pursues (-1 in the padding).
    segments: (b, T) int64 or None, index of that subgoal in its task (-1 in the padding).
    Subgoals and segments are labels for evaluation only. UserError for shapes that do not fit, and for lengths out of
    range; the latter are checked on the CPU only, because reading them from another device would synchronize with it.
    """

    states: Tensor
    actions: Tensor
    lengths: Tensor
    subgoals: Tensor | None = None
    segments: Tensor | None = None

    def __post_init__(self) -> None:
        batch, steps = self.actions.shape[:2]
        if batch == 0:
            raise UserError("Trajectories hold 0 episodes; give at least one.")
        if self.states.shape[:2] != (batch, steps + 1):
            raise UserError(
                f"states have shape {tuple(self.states.shape)} but actions of shape {tuple(self.actions.shape)} need "
                f"({batch}, {steps + 1}, ...): one state more than actions."
            )
        if self.lengths.shape != (batch,):
            raise UserError(f"lengths have shape {tuple(self.lengths.shape)}; expected ({batch},), one per episode.")
        check_lengths(self.lengths, batch, steps, "lengths", wait=False)

    @property
    def batch(self) -> int:
        """Number of episodes."""
        return self.actions.shape[0]

    @property
    def steps(self) -> int:
        """T, the padded number of actions."""
        return self.actions.shape[1]

    def mask(self) -> Tensor:
        """(b, T) bool: which actions are real."""
        return length_mask(self.lengths, self.steps)

    def index(self, rows: Tensor) -> Trajectories:
        """The episodes with indices ``rows`` (m,), cut to the longest of them."""
        steps = int(self.lengths[rows].max())
        cut = {"states": steps + 1, "actions": steps, "subgoals": steps, "segments": steps}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        selected = {
            name: value[rows, : cut[name]] if name in cut else value[rows]
            for name, value in values.items()
            if value is not None
        }
        return replace(self, **selected)

    def to(self, device: torch.device | str) -> Trajectories:
        """The same episodes on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})


def length_mask(lengths: Tensor, steps: int) -> Tensor:
    """(b, steps) bool: true at real steps. lengths (b,)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (b, t) over mask (b, t) bool, a scalar; 0 for an empty mask. Masked values must be finite."""
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp_min(1)


def check_lengths(
    lengths: Tensor | None, batch: int, steps: int, name: str = "episode_lens", *, wait: bool = True
) -> None:
    """UserError unless ``lengths`` is None or holds ``batch`` whole numbers within 1..steps.

    With wait=False the values are checked on the CPU only, because reading them from another device would synchronize
    with it.
    """
    if lengths is None:
        return
    if lengths.shape != (batch,) or lengths.dtype.is_floating_point:
        raise UserError(
            f"{name} has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; "
            f"expected ({batch},) whole numbers, one per episode."
        )
    if not wait and lengths.device.type != "cpu":
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 1 or high > steps:
        raise UserError(f"{name} ranges over {low}..{high}; each must lie in 1..{steps}, the padded length.")
