"""Clips: a few steps of a demonstration each, which begin where its expert decides (our choice).

Where an expert decides in one step of dozens, nearly all of what a model reads teaches it to go on. Clips of further
demonstrations beside a batch show many decisions at little cost, and without what went before, so that a model has to
look where it is.

Axes: b episodes, t steps, c clips, k steps of a clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metacontroller.data.batching import Generate
from metacontroller.data.trajectories import Trajectories

CLIPS_OF_EACH = 8
"""Clips that are cut from one demonstration, at most."""

Decisions = Callable[[Trajectories], Tensor]
"""Episodes -> (b, t) bool: steps at which an expert may decide, see `Domain.decisions`."""


class Clips(NamedTuple):
    """clips: c episodes of at most k steps. episodes: the b that they are from; rows, starts (c,) int64: which of them,
    and at which step each begins."""

    clips: Trajectories
    episodes: Trajectories
    rows: Tensor
    starts: Tensor


def draw_clips(generate: Generate, decisions: Decisions, count: int, steps: int, generator: torch.Generator) -> Clips:
    """``count`` clips of ``steps`` steps, from new demonstrations; shorter ones of episodes that are.

    Each begins at a step drawn, with replacement, among the first one and the decisions of its episode.
    """
    episodes = generate(-(-count // CLIPS_OF_EACH), generator)
    return cut_clips(episodes, decisions(episodes), count, steps, generator)


def cut_clips(episodes: Trajectories, at: Tensor, count: int, steps: int, generator: torch.Generator) -> Clips:
    """``count`` clips, `CLIPS_OF_EACH` of an episode, which begin at one of the steps ``at`` (b, t) bool or at the
    first."""
    time = torch.arange(episodes.steps, device=at.device)
    begins = (at & (time <= episodes.lengths[:, None] - steps)) | (time == 0)
    starts = torch.multinomial(begins.float(), CLIPS_OF_EACH, replacement=True, generator=generator)
    rows = torch.arange(episodes.batch, device=at.device).repeat_interleave(CLIPS_OF_EACH)[:count]
    starts = starts.flatten()[:count]
    index = starts[:, None] + torch.arange(steps + 1, device=at.device)
    clips = Trajectories(
        states=episodes.states[rows[:, None], index.clamp(max=episodes.states.shape[1] - 1)],
        actions=episodes.actions[rows[:, None], index[:, :-1].clamp(max=episodes.steps - 1)],
        lengths=(episodes.lengths[rows] - starts).clamp(max=steps),
    )
    return Clips(clips, episodes, rows, starts)


_FIELDS = ("states", "actions", "lengths")


def clip_extras(drawn: Clips, batch: Trajectories) -> dict[str, Tensor]:
    """Clips as extras (b, ...) of a whole batch, the same number for each of its episodes, for `clips_of`."""
    extras = {f"clip_{name}": getattr(drawn.clips, name).unflatten(0, (batch.batch, -1)) for name in _FIELDS}
    share = drawn.clips.lengths.sum() / batch.lengths.sum()
    return {**extras, "clip_share": share.expand(batch.batch)}


def clips_of(extras: dict[str, Tensor], batch: Trajectories) -> tuple[Trajectories, Tensor]:
    """The clips of a batch, or of a process's rows of it, and a factor for a mean over their steps.

    `train` weights a process by its share of all real steps of the batch. With the factor, 1 in a single process, the
    sum over processes is the mean over all clips.
    """
    clips = Trajectories(**{name: extras[f"clip_{name}"].flatten(0, 1) for name in _FIELDS})
    return clips, clips.lengths.sum() / batch.lengths.sum() / extras["clip_share"][0]
