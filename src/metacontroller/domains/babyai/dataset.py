"""The bot's episodes on disk: made once, by several processes, and read by all phases and runs of the same room."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from metacontroller.data.store import TrajectoryStore
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.babyai.bot import Episode, play
from metacontroller.domains.babyai.level import Room
from metacontroller.errors import UserError

CHUNK = 250
"""Episodes that a process makes at a time."""
TRAINING_ROOMS = 2**31
"""Seeds of rooms for training are below; as many above are those for validation."""
ATTEMPTS = 100
"""Seeds that are tried for one episode; the bot fails in a few of a hundred."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the bot's episodes depend on. objects: (kind, color). tasks: indices of objects, one task an episode.
    validation: whether rooms have seeds that those for training never have."""

    objects: tuple[tuple[str, str], ...]
    tasks: tuple[tuple[int, ...], ...]
    room_size: int
    max_steps: int
    epsilon: float
    mission_length: int
    seed: int
    validation: bool = False

    def folder(self, episodes: int) -> str:
        """A name that no other recipe or number of episodes has."""
        facts = {name: value for name, value in vars(self).items() if name != "validation" or value}
        text = json.dumps([FORMAT, sorted(facts.items()), episodes])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


FORMAT = 2
"""Counts up when the same recipe gives other episodes."""


class Made(NamedTuple):
    """An episode, the index of its task in the recipe, and the seed of its room."""

    task: int
    seed: int
    episode: Episode


def open_dataset(recipe: Recipe, episodes: int, root: Path, workers: int, versions: dict[str, str]) -> TrajectoryStore:
    """The store of so many episodes under ``root``, written first if it is not there; the easiest episodes come first.

    An episode is as difficult as it is long. workers: processes, 0 for one a core; the episodes do not depend on them.
    versions: the record of the world as it is installed, which the store keeps; opening one of others warns.
    """
    path = root / recipe.folder(episodes)

    def write() -> TrajectoryStore:
        made = by_difficulty(generate(recipe, episodes, workers))
        return TrajectoryStore.write(path, made, {"versions": versions})

    store = TrajectoryStore.once(path, write)
    store.check_versions(versions)
    return store


def generate(recipe: Recipe, episodes: int, workers: int = 1) -> Trajectories:
    """Successful episodes of the bot; each has its own seed and a random task of the recipe. states: uint8."""
    starts = range(0, episodes, CHUNK)
    chunks = [(recipe, start, min(CHUNK, episodes - start)) for start in starts]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    if workers == 1:
        made = [_chunk(chunk) for chunk in chunks]
    else:  # not forked: a process that runs threads of PyTorch must not be
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            try:
                made = list(pool.map(_chunk, chunks))
            except BrokenProcessPool as error:
                raise UserError(
                    "a process that makes demonstrations ended early; if a script of yours asked for them, start its "
                    "work under if __name__ == '__main__', or set workers to 1."
                ) from error
    return _pad([episode for part in made for episode in part], recipe)


def by_difficulty(episodes: Trajectories) -> Trajectories:
    """The same episodes, the shortest first."""
    return episodes.index(torch.argsort(episodes.lengths, stable=True))


def _chunk(chunk: tuple[Recipe, int, int]) -> list[Made]:
    """The episodes start .. start + count - 1."""
    recipe, start, count = chunk
    rooms = [Room(recipe.objects, task, size=recipe.room_size, max_steps=recipe.max_steps) for task in recipe.tasks]
    return [_episode(recipe, rooms, number) for number in range(start, start + count)]


def _episode(recipe: Recipe, rooms: Sequence[Room], number: int) -> Made:
    random = np.random.default_rng([recipe.seed, number])
    task = int(random.integers(len(rooms)))
    for _ in range(ATTEMPTS):
        seed = int(random.integers(TRAINING_ROOMS)) + TRAINING_ROOMS * recipe.validation
        episode = play(rooms[task], seed, epsilon=recipe.epsilon, mission_length=recipe.mission_length)
        if episode is not None:
            return Made(task, seed, episode)
    raise UserError(
        f"the bot failed {ATTEMPTS} times at task {'-'.join(map(str, recipe.tasks[task]))}; raise max_steps "
        f"({recipe.max_steps}) or lower epsilon ({recipe.epsilon})."
    )


def _pad(made: Sequence[Made], recipe: Recipe) -> Trajectories:
    lengths, seeds = (
        np.array(values) for values in zip(*((len(one.episode.actions), one.seed) for one in made), strict=True)
    )
    longest = int(lengths.max())
    first = made[0].episode.states
    states = np.zeros((len(made), longest + 1, first.shape[1]), np.uint8)
    actions, segments = np.zeros((len(made), longest), np.int64), np.full((len(made), longest), -1)
    subgoals = segments.copy()
    for row, (task, _, episode) in enumerate(made):
        end = lengths[row]
        states[row, : end + 1], states[row, end + 1 :] = episode.states, episode.states[-1]
        actions[row, :end], segments[row, :end] = episode.actions, episode.segments
        subgoals[row, :end] = np.array(recipe.tasks[task])[episode.segments]
    arrays = {"states": states, "actions": actions, "lengths": lengths, "subgoals": subgoals, "segments": segments}
    return Trajectories(**{name: torch.from_numpy(array) for name, array in {**arrays, "seeds": seeds}.items()})
