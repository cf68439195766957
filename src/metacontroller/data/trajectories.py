"""Behaviour data: episodes as padded batches with lengths, or side by side without padding, and masks.

Axes: b episodes, t steps. A sequence holds T actions and T + 1 states: ``o_1, a_1, ..., a_T, o_{T+1}`` (paper §1).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metacontroller.data.formats import minari
from metacontroller.errors import UserError
from metacontroller.ranges import Count, Rows, check, require, shown
from metacontroller.tensors import check_entries, check_lengths, check_rows, check_tensor

ENDINGS = ("terminated", "truncated")
PER_EPISODE = ("lengths", *ENDINGS, "seeds")
"""Fields with one entry an episode; the others have one a step, ``states`` one more."""
FINITE = ("actions", "rewards", "states")
"""Fields that may hold neither NaN nor infinity."""
PADDING = {"subgoals": -1, "segments": -1}
"""What fills the steps beyond an episode's end, where that is not 0; states repeat their last entry."""
PIECE = 65536
"""Rows of an array that are read at once."""


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

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def mask(self) -> Tensor:
        """(b, T) bool: which actions are real."""
        return length_mask(self.lengths, self.steps)

    def index(self, rows: Tensor) -> Trajectories:
        """The episodes with indices ``rows`` (m,), cut to the longest of them."""
        check_rows(rows, self.batch)
        steps = int(self.lengths[rows].max())
        selected = {
            name: value[rows] if name in PER_EPISODE else value[rows, : steps + (name == "states")]
            for name, value in self.tensors().items()
        }
        return replace(self, **selected)

    def to(self, device: torch.device | str) -> Trajectories:
        """The same episodes on another device."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

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
        return Episodes.of_rows(enumerate(episodes)).padded()

    @classmethod
    def from_minari(cls, dataset: Any) -> Trajectories:
        """All episodes of a `minari.MinariDataset`, or of the local one with that ID; see `data.formats.minari`."""
        return Episodes.of_rows(minari.read(dataset).episodes).padded()

    def episodes(self) -> Iterator[dict[str, Tensor]]:
        """The episodes one by one, without padding, as ``from_episodes`` takes them."""
        for episode in Episodes.of(self):
            yield {name: torch.as_tensor(value) for name, value in episode.items()}


class Episodes:
    """Episodes of any lengths. arrays: the fields of `Trajectories` by name, episode after episode without padding."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)
        self.lengths = np.asarray(self.arrays["lengths"])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    @classmethod
    def of(cls, trajectories: Trajectories) -> Episodes:
        """The real steps of padded episodes."""
        lengths, arrays = trajectories.lengths.cpu(), {}
        for name, value in trajectories.tensors().items():
            if name not in PER_EPISODE:
                value = value.cpu()[length_mask(lengths + (name == "states"), value.shape[1])]
            arrays[name] = value.cpu().numpy()
        return cls(arrays)

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[int, Any]]) -> Episodes:
        """Episodes one by one: each a mapping as `Trajectories.from_episodes` takes it, with the number by which errors
        name it. UserError for one that is not sound by itself or does not look like the first, and for none."""
        columns: dict[str, list[np.ndarray]] = defaultdict(list)
        first: dict[str, np.ndarray] = {}
        for number, row in rows:
            episode = _as_arrays(row, number)
            first = first or episode
            _check_episode(episode, number, first)
            for name, value in {**episode, "lengths": np.array(len(episode["actions"]))}.items():
                columns[name].append(np.atleast_1d(value))
        if not columns:
            raise UserError("no episode is given; give at least one.")
        names = [field.name for field in fields(Trajectories) if field.name in columns]
        return cls({name: np.concatenate(columns[name]) for name in names})

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The episodes one by one, as ``of_rows`` takes them."""
        for episode in range(len(self)):
            yield {
                name: array[episode] if name in PER_EPISODE else array[self.rows(name, episode)]
                for name, array in self.arrays.items()
                if name != "lengths"
            }

    def first_row(self, name: str, episode: Any) -> Any:
        """The row of an array with which an episode, or each of several, begins; number ``len(self)`` is the end."""
        return episode if name in PER_EPISODE else self.starts[episode] + episode * (name == "states")

    def rows(self, name: str, episode: int) -> slice:
        """The rows of an array that are of an episode."""
        return slice(self.first_row(name, episode), self.first_row(name, episode + 1))

    def digest(self) -> str:
        """SHA-256 of all arrays, of the same content the same."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            for start in range(0, len(array), PIECE):
                digest.update(np.ascontiguousarray(array[start : start + PIECE]).data)
        return digest.hexdigest()

    def refuse_not_finite(self) -> None:
        """UserError if states, actions or rewards hold NaN or infinity; all of them are read."""
        for name in sorted({*FINITE} & self.arrays.keys()):
            row = _first_not_finite(self.arrays[name])
            if row is not None:
                starts = self.first_row(name, np.arange(len(self) + 1))
                episode = int(np.searchsorted(starts, row, side="right")) - 1
                raise _not_finite(name, episode, row - int(starts[episode]))

    def padded(self) -> Trajectories:
        """All episodes."""
        return self.read(np.arange(len(self)))

    def read(
        self, rows: np.ndarray | Tensor, *, longest: int | None = None, rng: np.random.Generator | None = None
    ) -> Trajectories:
        """The episodes with indices ``rows`` (b,), padded to the longest; UserError for indices out of range.

        longest: of an episode of more steps only so many are read, from its start, or from a step that ``rng`` draws.
        """
        index = np.asarray(rows)
        check_tensor("rows", torch.as_tensor(index), ("m",), int, "at least one index")
        check_entries("rows", torch.as_tensor(index), 0, len(self) - 1, "the episodes at hand")
        check("longest", longest, Count | None)
        full = self.lengths[index]
        lengths = full if longest is None else np.minimum(full, longest)
        skipped = np.zeros_like(full) if rng is None else rng.integers(0, full - lengths + 1)
        values = {"lengths": torch.from_numpy(lengths.copy())}
        for name in self.arrays.keys() - {"lengths"}:
            if name in PER_EPISODE:
                value = np.asarray(self.arrays[name])[index]
                if name in ENDINGS:
                    value = value & (skipped + lengths == full)  # a piece that stops before the end has not ended yet
            else:
                first = self.first_row(name, index) + skipped
                value = _gather_padded(self.arrays[name], first, lengths + (name == "states"), name)
            values[name] = torch.from_numpy(value)
        return Trajectories(**values)


def _gather_padded(array: np.ndarray, first: np.ndarray, lengths: np.ndarray, name: str) -> np.ndarray:
    """(b, longest, ...) rows of ``array``; states repeat their last entry in the padding, labels are -1, the rest 0."""
    offsets = np.arange(lengths.max())
    padded = array[first[:, None] + np.minimum(offsets, lengths[:, None] - 1)]
    if name != "states":
        padded[offsets >= lengths[:, None]] = PADDING.get(name, 0)
    return padded


def _as_arrays(row: Any, number: int) -> dict[str, np.ndarray]:
    """The fields of an episode as arrays; UserError for what is no array of numbers."""
    require(isinstance(row, Mapping), f"episode {number}", row, "a mapping of a field's name to an array")
    arrays = {}
    for name, value in row.items():
        try:
            arrays[name] = np.asarray(value)
            torch.as_tensor(arrays[name])
        except (TypeError, ValueError) as error:
            raise UserError(f"episode {number} has {name} {shown(value)}; expected an array of numbers.") from error
    return arrays


def _check_episode(row: Mapping[str, np.ndarray], number: int, first: Mapping[str, np.ndarray]) -> None:
    """UserError unless an episode is sound by itself, and each of its steps looks like a step of the first one."""
    known = {field.name for field in fields(Trajectories)} - {"lengths"}
    if not {"states", "actions"} <= row.keys() <= known or row.keys() != first.keys():
        raise UserError(
            f"episode {number} has the fields {sorted(row)} and the first {sorted(first)}; expected the same, with "
            f"states and actions, of {', '.join(sorted(known))}."
        )
    for name, value in row.items():
        if (value.ndim == 0) != (name in PER_EPISODE):
            expected = "one value" if name in PER_EPISODE else "one entry a step"
            raise UserError(f"episode {number} has {name} of shape {value.shape}; expected {expected}.")
    steps = len(row["actions"])
    for name, value in row.items():
        if name not in PER_EPISODE and (steps == 0 or len(value) != steps + (name == "states")):
            raise UserError(
                f"episode {number} has {len(value)} {name} and {steps} actions; expected at least one action, one "
                "state more, and as many of the rest."
            )
        if value.shape[1:] != first[name].shape[1:] or value.dtype != first[name].dtype:
            raise UserError(
                f"episode {number} has {name} of shape {value.shape} and dtype {value.dtype} and the first of shape "
                f"{first[name].shape} and dtype {first[name].dtype}; expected the same but for the steps."
            )
        step = _first_not_finite(value) if name in FINITE else None
        if step is not None:
            raise _not_finite(name, number, step)


def _first_not_finite(array: np.ndarray) -> int | None:
    """The first row of an array (n, ...) that holds NaN or infinity."""
    if not np.issubdtype(array.dtype, np.floating):
        return None
    for start in range(0, len(array), PIECE):
        finite = np.isfinite(array[start : start + PIECE]).all(tuple(range(1, array.ndim)))
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def _not_finite(name: str, episode: int, step: int) -> UserError:
    return UserError(
        f"episode {episode} has {name} that are NaN or infinite at step {step}, both counted from 0; mend or leave out "
        "that episode."
    )


def length_mask(lengths: Tensor, steps: int) -> Tensor:
    """(b, steps) bool: true at real steps. lengths (b,)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def full_lengths(lengths: Tensor | None, values: Tensor) -> Tensor:
    """``lengths`` (b,), or the number of steps of values (b, t, ...) for every row if there are none."""
    return values.new_full(values.shape[:1], values.shape[1], dtype=torch.long) if lengths is None else lengths


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
