"""The Gymnasium environments of the pinpad worlds: one episode, or many that step together.

A world defines an `EpisodeFactory`, and names it in a subclass of `PinpadEnv` and one of `PinpadVectorEnv`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from metacontroller.domains.pinpad.episodes import PinpadEpisodes
from metacontroller.domains.pinpad.layouts import Board
from metacontroller.domains.pinpad.tasks import check_tasks, read_tasks
from metacontroller.domains.reset_mask import rows_to_reset
from metacontroller.errors import UserError
from metacontroller.ranges import Count, check, check_options

TaskSpec = str | Iterable[str | Sequence[int]]


class EpisodeFactory(ABC):
    """A world as its two environments use it: tasks, spaces, the start of episodes, what they show.

    tasks: to sample from, by default those of ``table``; task: the one of every episode instead. board: fields of
    ``Board``. UserError for unknown tasks and fields, and for another render mode than "rgb_array".
    """

    Board: ClassVar[type[Board]]
    table: ClassVar[str]
    observation_space: spaces.Space
    action_space: spaces.Space

    def __init__(
        self,
        *,
        tasks: TaskSpec | None = None,
        task: str | Sequence[int] | None = None,
        render_mode: str | None = None,
        **board: Any,
    ) -> None:
        if tasks is not None and task is not None:
            raise UserError(
                "both tasks and task were given; give tasks to sample from, or the one task of every episode."
            )
        check("render_mode", render_mode, Literal["rgb_array"] | None)
        check_options("the environment", board, self.Board)
        self.render_mode, self.board = render_mode, self.Board(**board)
        self.tasks = read_tasks((self.table if tasks is None else tasks) if task is None else [task])
        check_tasks(self.tasks, self.board.num_colors)

    def start(self, n: int, random: np.random.Generator) -> Any:
        """n new episodes; all their randomness comes from the numpy generator."""
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        return self.begin(torch.randint(len(self.tasks), (n,), generator=generator), generator)

    @abstractmethod
    def begin(self, drawn: Tensor, generator: torch.Generator) -> PinpadEpisodes:
        """New episodes of the tasks with the numbers ``drawn`` (n,) int64."""

    def observe(self, batch: Any) -> np.ndarray:
        """The observations of all episodes."""
        return batch.observation.numpy()

    @abstractmethod
    def actions(self, actions: np.ndarray, n: int) -> Tensor:
        """The actions of n episodes; UserError unless they are such."""

    @abstractmethod
    def pictures(self, batch: Any) -> list[np.ndarray]:
        """A picture of each episode, uint8 (height, width, 3)."""

    def render(self, batch: Any) -> list[np.ndarray] | None:
        """A picture of each episode; None without a render mode. RuntimeError before the first episode."""
        return None if self.render_mode is None else self.pictures(started(batch))


def started(batch: Any) -> Any:
    """The batch; RuntimeError before the first episode."""
    if batch is None:
        raise RuntimeError("no episode has started: call reset() before step() or render().")
    return batch


class PinpadEnv(gymnasium.Env[np.ndarray, Any]):
    """One episode at a time. options: of the world's `EpisodeFactory`."""

    Episodes: ClassVar[type[EpisodeFactory]]

    def __init__(self, **options: Any) -> None:
        self._episodes, self._batch = self.Episodes(**options), None
        self.render_mode = self._episodes.render_mode
        self.observation_space, self.action_space = self._episodes.observation_space, self._episodes.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode with a random layout and task; the same seed gives the same episodes."""
        super().reset(seed=seed)
        self._batch = self._episodes.start(1, self.np_random)
        return self._episodes.observe(self._batch)[0], self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one action."""
        batch, action = started(self._batch), np.asarray(action)
        one = action.reshape(1) if action.size == 1 else action[None]
        reward = float(batch.step(self._episodes.actions(one, 1)))
        observation = self._episodes.observe(batch)[0]
        return observation, reward, bool(batch.terminated), bool(batch.truncated), self._info()

    def render(self) -> np.ndarray | None:
        """A picture, uint8 (height, width, 3); None without a render mode."""
        pictures = self._episodes.render(self._batch)
        return None if pictures is None else pictures[0]

    def _info(self) -> dict[str, Any]:
        batch = started(self._batch)
        colors = tuple(batch.tasks[0, : int(batch.task_lengths)].tolist())
        return {"task": colors, "colors_done": int(batch.colors_done), "subgoal": int(batch.next_color())}


class PinpadVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many episodes that step together. A subclass declares autoreset ``NEXT_STEP`` in its metadata."""

    Episodes: ClassVar[type[EpisodeFactory]]

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        check("num_envs", num_envs, Count)
        self._episodes, self._batch = self.Episodes(**options), None
        self.num_envs, self.render_mode = num_envs, self._episodes.render_mode
        self.single_observation_space = self._episodes.observation_space
        self.single_action_space = self._episodes.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every row, or in those of ``options["reset_mask"]`` (num_envs,) bool, whose info it
        returns; one integer seed determines the episodes of all."""
        chosen = rows_to_reset(options, self.num_envs, self._batch is not None)
        super().reset(seed=seed)
        if chosen is None or self._batch is None:
            self._batch = self._episodes.start(self.num_envs, self.np_random)
            return self._episodes.observe(self._batch), self._info()
        rows = torch.from_numpy(chosen.nonzero()[0])
        self._batch.replace(rows, self._episodes.start(len(rows), self.np_random))
        return self._episodes.observe(self._batch), self._info(chosen)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes one action a row; rows that had ended start a new episode instead."""
        batch, chosen = started(self._batch), self._episodes.actions(np.asarray(actions), self.num_envs)
        ended = (batch.terminated | batch.truncated).nonzero().squeeze(1)
        rewards = batch.step(chosen)
        if len(ended):
            batch.replace(ended, self._episodes.start(len(ended), self.np_random))
        observations = self._episodes.observe(batch)
        return observations, rewards.numpy(), batch.terminated.numpy(), batch.truncated.numpy(), self._info()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture of each row; None without a render mode."""
        pictures = self._episodes.render(self._batch)
        return None if pictures is None else tuple(pictures)

    def _info(self, rows: np.ndarray | None = None) -> dict[str, Any]:
        known, batch = np.ones(self.num_envs, dtype=bool) if rows is None else rows, started(self._batch)
        values = {"task": batch.tasks, "colors_done": batch.colors_done, "subgoal": batch.next_color()}
        info: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
        return info | {f"_{name}": known.copy() for name in values}
