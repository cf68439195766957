"""Demonstrations of minigrid's own bot, with its stack of subgoals as labels: a recipe that several processes follow.

`open_dataset` keeps them on disk.
"""

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
from minigrid.utils.baby_ai_bot import BabyAIBot

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.babyai.batch import FORWARD, NUM_ACTIONS
from metacontroller.domains.babyai.level import Room
from metacontroller.domains.babyai.observation import (
    EMPTY,
    VIEW_OFFSETS,
    image_symbols,
    mission_words,
    object_symbol,
    view_symbols,
)
from metacontroller.domains.pinpad import worlds
from metacontroller.errors import UserError

ENTRIES = 3
"""What the bot's stack holds of each instruction: go there, pick up, drop."""
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
            return episode
    raise UserError(
        f"the bot failed {ATTEMPTS} times at task {'-'.join(map(str, room.task))}; raise max_steps "
        f"({recipe.max_steps}) or lower epsilon ({recipe.epsilon})."
    )


class RoomBot(BabyAIBot):
    """Minigrid's bot. What it sees of a single room is known without looking cell by cell, which is faster."""

    def __init__(self, room: Room) -> None:
        super().__init__(room)
        self.planned = list(self.stack)  # the mission's own entries; what is pushed on top of them comes and goes

    def _process_obs(self) -> None:
        room = self.mission
        x, y = (VIEW_OFFSETS[room.agent_dir] + room.agent_pos).T
        inside = (x >= 0) & (x < room.width) & (y >= 0) & (y < room.height)
        self.vis_mask[x[inside], y[inside]] = True

    def segment(self) -> int:
        """Index of the instruction that the bot works on: that of the uppermost entry of the mission on its stack.

        What it has pushed on top, to explore or to clear its way, serves that instruction.
        """
        left = sum(entry in self.planned for entry in self.stack)
        return (len(self.planned) - left) // ENTRIES


def play(room: Room, seed: int, *, epsilon: float, mission_length: int) -> dict[str, Any] | None:
    """The bot's episode in a room that it resets with ``seed``, as `Trajectories.from_episodes` takes it; None if it
    does not succeed. states: (t + 1, observation) uint8, with the mission.

    A share ``epsilon`` of its moves (left, right, forward) is replaced by random ones, after which it plans anew. A
    mission of more words than ``mission_length`` is left out of what it sees.
    """
    room.reset(seed=seed)
    noise = np.random.default_rng([seed, 1])
    cells = image_symbols(room.grid.encode())
    symbols = np.array([*(object_symbol(*kind) for kind in room.kinds), EMPTY])  # -1: nothing carried
    readable = len(room.mission.split()) <= mission_length
    words = mission_words(room.mission if readable else "", mission_length)

    def observe() -> np.ndarray:
        carried, facing = room.carried, tuple(room.front_pos)
        thing = room.grid.get(*facing)
        index = next((index for index, known in enumerate(room.objects) if known is thing), None)
        if cells[facing] > 2 or index is not None:  # what was picked up or dropped, it was in front
            cells[facing] = EMPTY if index is None else symbols[index]
        place, direction = np.array([room.agent_pos]), np.array([room.agent_dir])
        view = view_symbols(cells[None], place, direction, symbols[[carried]])[0]
        return np.concatenate([view, direction, words]).astype(np.uint8)

    bot, states, actions, segments = RoomBot(room), [observe()], [], []
    action, ended, truncated, reward = None, False, False, 0.0
    while not (ended or truncated):
        try:
            suggested = bot.replan(action)
        except AssertionError:
            return None  # the bot knows no way any more
        if suggested is None or suggested >= NUM_ACTIONS:
            return None  # it takes the mission for done
        action = int(suggested)
        segments.append(bot.segment())
        if action <= FORWARD and noise.random() < epsilon:
            action = int(noise.integers(FORWARD + 1))
        _, earned, ended, truncated, _ = room.step(action)
        reward = float(earned)
        actions.append(action)
        states.append(observe())
    if reward <= 0:
        return None
    labels = {"subgoals": np.array(room.task)[segments], "segments": np.array(segments), "seeds": seed}
    return {"states": np.stack(states), "actions": np.array(actions), **labels}
