"""Behaviour data: padded batches of episodes with lengths, and masks.

Axes: b episodes, t steps. A sequence holds T actions and T + 1 states: ``o_1, a_1, ..., a_T, o_{T+1}`` (paper §1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metacontroller.data.minari import minari_episodes, open_minari, refusing_damage
from metacontroller.errors import UserError
from metacontroller.ranges import Rows, check, require, shown
from metacontroller.tensors import check_lengths, check_rows, check_tensor

ENDINGS = ("terminated", "truncated")
PER_EPISODE = ("lengths", *ENDINGS, "seeds")
"""Fields with one entry an episode; the others have one a step, ``states`` one more."""

FINITE = frozenset({"states", "actions", "rewards"})
"""Fields that may hold neither NaN nor infinity."""

PADDING = {"subgoals": -1, "segments": -1}
"""What fills the steps beyond an episode's end, where that is not 0; states repeat their last entry."""


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """A padded batch of episodes.

    states: (b, T + 1, ...) observations o_1 .. o_{T+1}; the padding repeats the last one.
    actions: (b, T, ...) actions a_1 .. a_T; zeros in the padding.
    lengths: (b,) int64, number of actions of each episode, 1 <= length <= T.
    subgoals: (b, T) int64 or None, which subgoal each action pursues (-1 in the padding).
    segments: (b, T) int64 or None, index of that subgoal in its task (-1 in the padding).
    rewards: (b, T) or None; zeros in the padding. terminated, truncated: (b,) bool or None, how each episode ended.
    seeds: (b,) int64 or None, from which a world can start the same episode anew.
    Training reads none of these; a dataset keeps them.
    Subgoals and segments are labels for evaluation only. UserError for shapes that do not fit, and for lengths out of
    range; the latter are checked on the CPU only, because reading them from another device would synchronize with it.
    """

    states: Tensor
    actions: Tensor
    lengths: Tensor
    subgoals: Tensor | None = None
    segments: Tensor | None = None
    rewards: Tensor | None = None
    terminated: Tensor | None = None
    truncated: Tensor | None = None
    seeds: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            check_tensor(field.name, getattr(self, field.name), none=field.default is None)
        check_tensor("actions", self.actions, ("episodes", "steps", ...))
        batch, steps = self.actions.shape[:2]
        check_tensor("states", self.states, (batch, steps + 1, ...), what="one state more than actions")
        check_lengths(self.lengths, batch, steps, "lengths", wait=False)
        for name in ("subgoals", "segments", "rewards", *ENDINGS, "seeds"):
            shape, what = ((batch,), "one an episode") if name in PER_EPISODE else ((batch, steps), "one a step")
            dtype = torch.bool if name in ENDINGS else None if name == "rewards" else torch.int64
            check_tensor(name, getattr(self, name), shape, dtype, what, none=True)

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
        check_rows(rows, self.batch)
        steps = int(self.lengths[rows].max())
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        selected = {
            name: value[rows] if name in PER_EPISODE else value[rows, : steps + (name == "states")]
            for name, value in values.items()
            if value is not None
        }
        return replace(self, **selected)

    def to(self, device: torch.device | str) -> Trajectories:
        """The same episodes on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})

    def sample(self, n: int, generator: torch.Generator) -> Trajectories:
        """n of the episodes, drawn with replacement, on the generator's device: a `data.batching.Generate`."""
        check("n", n, Rows)
        check("generator", generator, torch.Generator)
        rows = torch.randint(self.batch, (n,), generator=generator, device=generator.device)
        return self.index(rows.to(self.lengths.device)).to(generator.device)

    @classmethod
    def from_episodes(cls, episodes: Iterable[Mapping[str, Any]]) -> Trajectories:
        """Episodes of any lengths, each a mapping of a field's name to an array or tensor, padded.

        ``states`` (t + 1, ...) and ``actions`` (t, ...) are needed, ``subgoals``, ``segments``, ``rewards`` (t,),
        ``terminated`` and ``truncated`` (a bool each) and ``seeds`` (a number) are kept. UserError for other names, for
        episodes that do not fit together, and for values that are not finite.
        """
        require(isinstance(episodes, Iterable), "episodes", episodes, "a list of mappings, one an episode")
        return cls._of_rows(list(checked_episodes(enumerate(episodes))))

    @classmethod
    def _of_rows(cls, rows: list[dict[str, Tensor]]) -> Trajectories:
        """Episodes that were checked, padded."""
        if not rows:
            raise UserError("from_episodes was given no episode; give at least one.")
        lengths = torch.tensor([len(row["actions"]) for row in rows])
        steps = int(lengths.max())
        padded = {name: torch.stack([_padded(name, row[name], steps) for row in rows]) for name in rows[0]}
        return cls(lengths=lengths, **padded)

    @classmethod
    def from_minari(cls, dataset: Any) -> Trajectories:
        """All episodes of a `minari.MinariDataset`, or of the local one with that ID; see `data.minari`."""
        with refusing_damage(dataset):
            return cls._of_rows(list(checked_episodes(minari_episodes(open_minari(dataset)))))

    def episodes(self) -> Iterator[dict[str, Tensor]]:
        """The episodes one by one, without padding, as ``from_episodes`` takes them."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "lengths"}
        held = {name: value for name, value in values.items() if value is not None}
        for row, steps in enumerate(self.lengths.tolist()):
            yield {
                name: value[row] if name in PER_EPISODE else value[row, : steps + (name == "states")]
                for name, value in held.items()
            }


def checked_episodes(episodes: Iterable[tuple[int, Any]]) -> Iterator[dict[str, Tensor]]:
    """The episodes, each with the number by which errors name it, as tensors; UserError for one that is not sound by
    itself or does not look like the first."""
    known = {field.name for field in fields(Trajectories)} - {"lengths"}
    first: dict[str, Tensor] = {}
    for index, episode in episodes:
        row = _as_tensors(episode, index)
        first = first or row
        _check_episode(row, index, first.keys(), known)
        _check_alike(row, index, first)
        for name in FINITE & row.keys():
            refuse_not_finite(name, row[name].numpy(), lambda step, index=index: (index, step))
        yield row


def refuse_not_finite(
    name: str, array: np.ndarray, place: Callable[[int], tuple[int, int]], piece: int = 65536
) -> None:
    """UserError if the array (n, ...) holds NaN or infinity, which names episode and step. place: those of a row."""
    if not np.issubdtype(array.dtype, np.floating):
        return
    for start in range(0, len(array), piece):
        finite = np.isfinite(array[start : start + piece]).reshape(len(array[start : start + piece]), -1).all(1)
        if not finite.all():
            episode, step = place(start + int(np.argmin(finite)))
            raise UserError(
                f"episode {episode} has {name} that are NaN or infinite at step {step}, both counted from 0; mend or "
                "leave out that episode."
            )


def _as_tensors(row: Any, index: int) -> dict[str, Tensor]:
    """The fields of episode number ``index`` as tensors; UserError for what is no array of numbers."""
    if not isinstance(row, Mapping):
        raise UserError(f"episode {index} is {shown(row)}; expected a mapping of a field's name to an array.")
    tensors = {}
    for name, value in row.items():
        try:
            tensors[name] = torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise UserError(f"episode {index} has {name} {shown(value)}; expected an array of numbers.") from error
    return tensors


def _check_alike(row: Mapping[str, Tensor], index: int, first: Mapping[str, Tensor]) -> None:
    """UserError unless each step of an episode looks like a step of the first one."""
    for name, value in row.items():
        other = first[name]
        if value.shape[1:] != other.shape[1:] or value.dtype != other.dtype:
            raise UserError(
                f"episode {index} has {name} of shape {tuple(value.shape)} and dtype {value.dtype} and episode 0 of "
                f"shape {tuple(other.shape)} and dtype {other.dtype}; expected the same but for the steps."
            )


def _check_episode(row: Mapping[str, Tensor], index: int, names: Any, known: set[str]) -> None:
    if not {"states", "actions"} <= row.keys() or not row.keys() <= known or row.keys() != names:
        raise UserError(
            f"episode {index} has the fields {sorted(row)} and episode 0 {sorted(names)}; expected the same, with "
            f"states and actions, of {', '.join(sorted(known))}."
        )
    for name, value in row.items():
        if (value.dim() == 0) != (name in PER_EPISODE):
            expected = "one value" if name in PER_EPISODE else "one entry a step"
            raise UserError(f"episode {index} has {name} of shape {tuple(value.shape)}; expected {expected}.")
    steps = len(row["actions"])
    for name, value in row.items():
        expected = steps + (name == "states")
        if name not in PER_EPISODE and (steps == 0 or len(value) != expected):
            raise UserError(
                f"episode {index} has {len(value)} {name} and {steps} actions; expected at least one action, one state "
                "more, and as many of the rest."
            )


def _padded(name: str, value: Tensor, steps: int) -> Tensor:
    """The values of an episode for ``steps`` steps."""
    if name in PER_EPISODE:
        return value
    missing = steps + (name == "states") - len(value)
    last = value[-1:] if name == "states" else torch.full_like(value[:1], PADDING.get(name, 0))
    return torch.cat([value, last.expand(missing, *value.shape[1:])])


def length_mask(lengths: Tensor, steps: int) -> Tensor:
    """(b, steps) bool: true at real steps. lengths (b,)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def with_finite_padding(trajectories: Trajectories) -> Trajectories:
    """The same episodes with zeros for what is not finite beyond their ends, where a product with a gradient of 0 would
    still be NaN. What is not finite within an episode stays, for others to meet."""
    lengths, changed = trajectories.lengths, {}
    for name in ("states", "actions"):
        values = getattr(trajectories, name)
        if values.is_floating_point() and not bool(values.isfinite().all()):
            beyond = ~length_mask(lengths + (name == "states"), values.shape[1])
            beyond = beyond.view(*beyond.shape, *[1] * (values.dim() - 2))
            changed[name] = values.masked_fill(beyond & ~values.isfinite(), 0)
    return replace(trajectories, **changed) if changed else trajectories


class Ratio(NamedTuple):
    """A mean as the two scalars it is made of, so that those of several batches or processes are added before they are
    divided: a mean of means is another number where their counts differ."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """0 where nothing was counted."""
        return self.total / self.count.clamp_min(1)


def masked_sums(values: Tensor, mask: Tensor) -> Ratio:
    """Sum of values (b, t) over mask (b, t) bool, and the number of these steps.

    What is masked may be NaN: neither the sum nor its gradient sees it.
    """
    return Ratio(values.masked_fill(~mask, 0).sum(), mask.to(values.dtype).sum())


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (b, t) over mask (b, t) bool, a scalar; 0 for an empty mask. What is masked: see `masked_sums`."""
    return masked_sums(values, mask).mean
