"""Worlds whose tasks are lists of colors to visit in order, or of objects, which are numbered likewise."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from metacontroller.data.store import TrajectoryStore
from metacontroller.data.trajectories import Episodes, Trajectories
from metacontroller.domains.base import FREE, BatchedEnv, Domain, Free, Split
from metacontroller.domains.pinpad.tasks import (
    Task,
    check_tasks,
    format_task,
    parse_task,
    single_colors,
    subgoal_chunks,
    subgoal_indices,
    transitions,
)
from metacontroller.errors import UserError
from metacontroller.ranges import Count, Steps, check


class TaskWorld(Domain):
    """A world of tasks. Its config has ``num_colors``, ``tasks``, those of the demonstrations, and ``post_task``."""

    more_colors: ClassVar[str] = "raise num_colors"
    """What makes more colors known."""

    @property
    def subgoals(self) -> tuple[Task, ...]:
        """The vocabulary of subgoals, each as its colors; labels are indices of this tuple."""
        return single_colors(self.config.num_colors)

    def colors_of(self, task: Sequence[int] | Free | None) -> Task:
        """The colors of a task as of ``reset``, () for `FREE`; UserError for one that cannot be."""
        if task is FREE:
            return ()
        if isinstance(task, str):
            raise UserError(f"task is {task!r}; expected colors in order, such as (0, 1); parse_task reads text.")
        colors = self.config.post_task if task is None else tuple(task)  # type: ignore[arg-type]
        check_tasks([colors], self.config.num_colors, self.more_colors)
        subgoal_chunks(colors, len(self.subgoals[0]))  # raises for tasks that are not made of whole subgoals
        return colors

    def reset(self, n: int, generator: torch.Generator, *, task: Any = None, max_steps: int | None = None) -> Any:
        """n episodes, each on its own random layout; task: colors in order."""
        check("n", n, Count)
        check("max_steps", max_steps, Steps | None)
        return self.start(task, n, generator, self.config.max_steps if max_steps is None else max_steps)

    def start(self, task: Any, n: int, generator: torch.Generator, max_steps: int) -> BatchedEnv:
        """``reset`` with a time limit."""
        raise NotImplementedError

    def tasks_done(self, episodes: Trajectories) -> tuple[Tensor, Tensor]:
        """What labelled episodes got done: tasks (b, longest), padded with -1, and their lengths (b,)."""
        assert episodes.subgoals is not None
        assert episodes.segments is not None
        count = episodes.segments.amax(1) + 1
        order = episodes.segments.new_full((episodes.batch, int(count.max()) + 1), -1)
        order.scatter_(1, episodes.segments % order.shape[1], episodes.subgoals)  # padding goes to the last column
        colors = torch.tensor(self.subgoals, device=order.device)
        tasks = torch.where(order[:, :-1, None] >= 0, colors[order[:, :-1].clamp(min=0)], -1).flatten(1)
        return tasks, count * colors.shape[1]

    def seen_transitions(self) -> Tensor:
        seen = torch.eye(len(self.subgoals), dtype=torch.bool)
        for first, second in transitions(subgoal_indices(task, self.subgoals) for task in self.config.tasks):
            seen[first, second] = True
        return seen

    def parse_task(self, text: str) -> Any:
        return parse_task(text)

    def format_task(self, task: Any = None) -> str:
        return "free" if task is FREE else format_task(self.config.post_task if task is None else task)


class Recipe(ABC):
    """All that demonstrations on disk depend on, but for versions of packages."""

    @abstractmethod
    def facts(self) -> list[Any]:
        """It as JSON values."""

    @abstractmethod
    def make(self, episodes: int) -> tuple[Iterable[Trajectories], dict[str, Any]]:
        """At least so many episodes, and what else the store notes of them."""

    def folder(self, episodes: int) -> str:
        """A name that no other recipe or number of episodes has."""
        return hashlib.sha256(json.dumps([*self.facts(), episodes]).encode()).hexdigest()[:16]


def open_dataset(recipe: Recipe, episodes: int, root: Path, versions: dict[str, str]) -> TrajectoryStore:
    """The store of so many episodes under ``root``, written first if it is not there.

    versions: the record of the world as it is installed, which the store keeps; opening one of others warns.
    """
    path = root / recipe.folder(episodes)

    def write() -> TrajectoryStore:
        made, notes = recipe.make(episodes)
        return TrajectoryStore.join(path, map(Episodes.of, made), {"versions": versions, **notes}, most=episodes)

    store = TrajectoryStore.once(path, write)
    store.check_versions(versions)
    return store


class StoredWorld(TaskWorld):
    """A world whose demonstrations are on disk, a dataset for each split: written once, memory-mapped, and read by all
    phases and runs of the same recipe.

    Its config also has ``episodes``, those of each of the two phases, ``dataset``, the folder, and ``dataset_seed``.
    """

    validation_episodes: ClassVar[int]
    """Demonstrations on disk for validation, at most."""

    def recipe(self, split: Split) -> Recipe:
        """That of a split's demonstrations, which are others than those of any other split."""
        raise NotImplementedError

    def store(self, split: Split) -> TrajectoryStore:
        """The demonstrations of one split on disk, written first if they are not there."""
        return _open(type(self), self.config, split)

    def draw(self, split: Split, n: int, generator: torch.Generator, share: float = 1.0) -> Trajectories:
        """n episodes of a split, drawn with replacement from the first ``share`` of those on disk."""
        store, device = self.store(split), generator.device
        rows = torch.randint(max(1, round(share * len(store))), (n,), generator=generator, device=device)
        return store.read(rows.cpu()).to(device)


@cache
def _open(world: Callable[[Any], StoredWorld], config: Any, split: Split) -> TrajectoryStore:
    self = world(config)
    episodes = min(self.validation_episodes, config.episodes) if split == "validation" else config.episodes
    return open_dataset(self.recipe(split), episodes, Path(config.dataset), self.versions())
