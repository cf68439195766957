"""What the Gymnasium environments of the pinpad worlds have in common: one episode, or many that step together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from metacontroller.domains.pinpad.tasks import Task, check_tasks, read_tasks
from metacontroller.domains.reset_mask import rows_to_reset
from metacontroller.errors import UserError

TaskSpec = str | Iterable[str | Sequence[int]]


class Episodes(ABC):
    """A world as its two environments use it: tasks, spaces, the start of episodes, what they show.

    Batches are those of the world's simulator. UserError for unknown tasks, or for another render mode than
    "rgb_array".
    """

    observation_space: spaces.Space
    action_space: spaces.Space

    def __init__(
        self,
        tasks: TaskSpec | None,
        task: str | Sequence[int] | None,
        *,
        table: str,
        num_colors: int,
        render_mode: str | None,
    ) -> None:
        """tasks: to sample from, by default those of ``table``; task: the one of every episode instead."""
        if tasks is not None and task is not None:
            raise UserError(
                "both tasks and task were given; give tasks to sample from, or the one task of every episode."
            )
        if render_mode not in (None, "rgb_array"):
            raise UserError(f"render_mode is {render_mode!r}; expected 'rgb_array' or None.")
        self.render_mode = render_mode
        self.tasks: tuple[Task, ...] = (
            read_tasks(table if tasks is None else tasks) if task is None else read_tasks([task])
        )
        check_tasks(self.tasks, num_colors)

    def start(self, n: int, random: np.random.Generator) -> Any:
        """n new episodes; all their randomness comes from the numpy generator."""
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        return self.begin(torch.randint(len(self.tasks), (n,), generator=generator), generator)

    def render(self, batch: Any) -> list[np.ndarray] | None:
        """A picture of each episode; None without a render mode. RuntimeError before the first episode."""
        return None if self.render_mode is None else self.pictures(started(batch))

    @abstractmethod
    def begin(self, drawn: Tensor, generator: torch.Generator) -> Any:
        """New episodes of the tasks with the numbers ``drawn`` (n,) int64."""

    @abstractmethod
    def observe(self, batch: Any) -> np.ndarray:
        """The observations of all episodes."""

    @abstractmethod
    def one_action(self, action: Any) -> Tensor:
        """The action of a single episode as a batch of one; UserError unless it is one."""

    @abstractmethod
    def actions(self, actions: np.ndarray, n: int) -> Tensor:
        """The actions of n episodes; UserError unless they are such."""

    @abstractmethod
    def told(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Tasks (n, longest) padded with -1, colors visited so far (n,) and the next color (n,), all int64."""

    @abstractmethod
    def pictures(self, batch: Any) -> list[np.ndarray]:
        """A picture of each episode, uint8 (height, width, 3)."""


def started(batch: Any) -> Any:
    """The batch; RuntimeError before the first episode."""
    if batch is None:
        raise RuntimeError("no episode has started: call reset() before step() or render().")
    return batch


class PinpadEnv(gymnasium.Env[np.ndarray, Any]):
    """One episode at a time."""

    def __init__(self, episodes: Episodes) -> None:
        self.render_mode = episodes.render_mode
        self._episodes, self._batch = episodes, None
        self.observation_space, self.action_space = episodes.observation_space, episodes.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode with a random layout and task; the same seed gives the same episodes."""
        super().reset(seed=seed)
        self._batch = self._episodes.start(1, self.np_random)
        return self._episodes.observe(self._batch)[0], self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one action."""
        batch = started(self._batch)
        reward = float(batch.step(self._episodes.one_action(action)))
        observation = self._episodes.observe(batch)[0]
        return observation, reward, bool(batch.terminated), bool(batch.truncated), self._info()

    def render(self) -> np.ndarray | None:
        """A picture, uint8 (height, width, 3); None without a render mode."""
        pictures = self._episodes.render(self._batch)
        return None if pictures is None else pictures[0]

    def _info(self) -> dict[str, Any]:
        task, done, subgoal = self._episodes.told(self._batch)
        colors = tuple(color for color in task[0].tolist() if color >= 0)
        return {"task": colors, "colors_done": int(done), "subgoal": int(subgoal)}


class PinpadVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many episodes that step together. A subclass declares autoreset ``NEXT_STEP`` in its metadata."""

    def __init__(self, num_envs: int, episodes: Episodes) -> None:
        """UserError for fewer than one episode."""
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; ask for at least one.")
        self.num_envs, self.render_mode = num_envs, episodes.render_mode
        self._episodes, self._batch = episodes, None
        self.single_observation_space, self.single_action_space = episodes.observation_space, episodes.action_space
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
        batch, chosen = started(self._batch), self._episodes.actions(actions, self.num_envs)
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
        known = np.ones(self.num_envs, dtype=bool) if rows is None else rows
        told = zip(("task", "colors_done", "subgoal"), self._episodes.told(self._batch), strict=True)
        info: dict[str, Any] = {name: value.numpy() for name, value in told}
        return info | {f"_{name}": known.copy() for name in list(info)}
