"""The bot's demonstrations as a recipe, made by several processes: `open_dataset` keeps them on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.babyai.bot import play
from metacontroller.domains.babyai.level import Room
from metacontroller.domains.pinpad import worlds
from metacontroller.errors import UserError

CHUNK = 250
"""Episodes that a process makes at a time."""
TRAINING_ROOMS = 2**31
"""Seeds of rooms for training are below; as many above are those for validation."""
ATTEMPTS = 100
"""Seeds that are tried for one episode; the bot fails in a few of a hundred."""
FORMAT = 2
"""Counts up when the same recipe gives other episodes."""


@dataclass(frozen=True, kw_only=True)
class Recipe(worlds.Recipe):
    """All that the bot's episodes depend on. objects: (kind, color). tasks: indices of objects, one task an episode.
    validation: whether rooms have seeds that those for training never have. workers: processes, 0 for one a core; the
    episodes do not depend on them."""

    objects: tuple[tuple[str, str], ...]
    tasks: tuple[tuple[int, ...], ...]
    room_size: int
    max_steps: int
    epsilon: float
    mission_length: int
    seed: int
    validation: bool = False
    workers: int = field(default=1, compare=False)

    def facts(self) -> list[Any]:
        left_out = {"workers"} if self.validation else {"workers", "validation"}
        return [FORMAT, sorted((name, value) for name, value in vars(self).items() if name not in left_out)]

    def make(self, episodes: int) -> tuple[list[Trajectories], dict[str, Any]]:
        """So many episodes; the easiest come first, and an episode is as difficult as it is long."""
        made = generate(self, episodes)
        return [made.index(torch.argsort(made.lengths, stable=True))], {}


def generate(recipe: Recipe, episodes: int) -> Trajectories:
    """Successful episodes of the bot; each has its own seed and a random task of the recipe. states: uint8."""
    chunks = [(recipe, range(start, min(start + CHUNK, episodes))) for start in range(0, episodes, CHUNK)]
    workers = min(recipe.workers or os.cpu_count() or 1, len(chunks))
    if workers == 1:
        made = list(map(_chunk, chunks))
    else:  # not forked: a process that runs threads of PyTorch must not be
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            try:
                made = list(pool.map(_chunk, chunks))
            except BrokenProcessPool as error:
                raise UserError(
                    "a process that makes demonstrations ended early; if a script of yours asked for them, start its "
                    "work under if __name__ == '__main__', or set workers to 1."
                ) from error
    return Trajectories.from_episodes(episode for part in made for episode in part)


def _chunk(chunk: tuple[Recipe, range]) -> list[dict[str, Any]]:
    """The episodes with these numbers."""
    recipe, numbers = chunk
    rooms = [Room(recipe.objects, task, size=recipe.room_size, max_steps=recipe.max_steps) for task in recipe.tasks]
    return [_episode(recipe, rooms, number) for number in numbers]


def _episode(recipe: Recipe, rooms: Sequence[Room], number: int) -> dict[str, Any]:
    """An episode as `Trajectories.from_episodes` takes it."""
    random = np.random.default_rng([recipe.seed, number])
    room = rooms[int(random.integers(len(rooms)))]
    for _ in range(ATTEMPTS):
        seed = int(random.integers(TRAINING_ROOMS)) + TRAINING_ROOMS * recipe.validation
        episode = play(room, seed, epsilon=recipe.epsilon, mission_length=recipe.mission_length)
        if episode is not None:
            return {**episode._asdict(), "subgoals": np.array(room.task)[episode.segments], "seeds": seed}
    raise UserError(
        f"the bot failed {ATTEMPTS} times at task {'-'.join(map(str, room.task))}; raise max_steps "
        f"({recipe.max_steps}) or lower epsilon ({recipe.epsilon})."
    )
