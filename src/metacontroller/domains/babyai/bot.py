"""Episodes of minigrid's own bot, with its stack of subgoals as labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from minigrid.utils.baby_ai_bot import BabyAIBot

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

ENTRIES = 3
"""What the bot's stack holds of each instruction: go there, pick up, drop."""


class Episode(NamedTuple):
    """One episode of t actions: states (t + 1, observation) with the mission, uint8; actions, segments (t,) int64."""

    states: np.ndarray
    actions: np.ndarray
    segments: np.ndarray


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


def play(room: Room, seed: int, *, epsilon: float, mission_length: int) -> Episode | None:
    """The bot's episode in a room that it resets with ``seed``; None if it does not succeed.

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
    return None if reward <= 0 else Episode(np.stack(states), np.array(actions), np.array(segments))
