"""gridworld-pinpad as Gymnasium environments: one grid, or many that step together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, sample_layouts, tokens_to_onehot
from metacontroller.domains.gridworld_pinpad.rendering import render_rgb
from metacontroller.domains.gridworld_pinpad.simulator import NUM_ACTIONS, PinpadBatch, check_actions
from metacontroller.domains.pinpad_tasks import Task, check_tasks, pad_tasks, read_tasks
from metacontroller.errors import UserError

TaskSpec = str | Iterable[str | Sequence[int]]


class _Episodes:
    """Shared by the two environments: configuration, tasks, the start of an episode, observations and pictures."""

    def __init__(self, config: PinpadConfig, tasks: TaskSpec | None, task: str | Sequence[int] | None) -> None:
        if tasks is not None and task is not None:
            raise UserError(
                "both tasks and task were given: give tasks to sample from, or the one task of every episode."
            )
        self.config = config
        self.tasks: tuple[Task, ...] = (
            read_tasks("A1" if tasks is None else tasks) if task is None else read_tasks([task])
        )
        check_tasks(self.tasks, config.num_colors)
        self.padded, self.lengths = pad_tasks(self.tasks)
        self.observation_space = spaces.Box(0.0, 1.0, (config.observation_size,), np.float32)
        self.action_space = spaces.Discrete(NUM_ACTIONS)

    def start(self, n: int, random: np.random.Generator) -> PinpadBatch:
        """Return n new grids; all their randomness comes from the numpy generator."""
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        task = torch.randint(len(self.tasks), (n,), generator=generator)
        layouts = sample_layouts(self.config, n, generator)
        return PinpadBatch(self.config, layouts, self.padded[task], self.lengths[task])

    def observe(self, grids: PinpadBatch) -> np.ndarray:
        """Return the paper's observation vectors, float32 (grids, observation_size)."""
        return tokens_to_onehot(self.config, grids.observe_tokens()).numpy()

    def render(self, grids: PinpadBatch) -> list[np.ndarray]:
        """Return one picture per grid."""
        tokens = grids.observe_tokens().tolist()
        return [render_rgb(self.config, row[:-1], row[-1]) for row in tokens]


def _check_render_mode(render_mode: str | None, metadata: dict[str, Any]) -> None:
    if render_mode is not None and render_mode not in metadata["render_modes"]:
        raise UserError(f"render_mode is {render_mode!r}: choose one of {metadata['render_modes']} or None.")


def _started(grids: PinpadBatch | None) -> PinpadBatch:
    if grids is None:
        raise RuntimeError("no episode has started: call reset() before step() or render().")
    return grids


class GridworldPinpadEnv(gymnasium.Env[np.ndarray, np.int64]):
    """gridworld-pinpad, ``metacontroller/GridworldPinpad-v0``: visit the colors of a hidden task in order.

    World: a grid of ``size`` x ``size`` cells with ``num_colors`` colored cells, ``num_walls`` walls and the agent, all
    placed at random without overlap at each reset. Layouts in which some color cannot be reached from the start, or
    from another color, without crossing a wall or another color are sampled again (our choice; the paper is silent).

    Action space: ``Discrete(4)``: 0 up, 1 down, 2 left, 3 right. Moving into a wall or off the grid changes nothing.

    Observation space: ``Box(0, 1, (size² (num_colors + num_walls + 1),), float32)``: for each color, then for each
    wall, then for the agent, a one-hot over the cells in row order. The task is not observed.

    Reward: 1 on the step that visits the last color of the task, else 0. A colored cell is visited when the agent
    moves onto it from another cell; a move that changes nothing while standing on it is no visit.

    Endings: ``terminated`` on success and on visiting a color that is not the next of the task; ``truncated`` after
    ``max_steps`` steps otherwise. After that the grid stays as it is, with reward 0, until reset.

    Info, for evaluation only: ``task`` (its colors), ``colors_done`` (colors visited so far) and ``subgoal`` (the next
    color, -1 once the task is done).

    Versions: v0, as described here, after the grid of arXiv 2512.20605.

    Args:
        size, num_colors, num_walls, max_steps: see `PinpadConfig`; the defaults are the paper's.
        tasks: from which the task of an episode is sampled: "A1" (the default) or "A2", the paper's tables, or a list.
        task: the one task of every episode, such as "0-1-2-3", instead of `tasks`.
        render_mode: None or "rgb_array".
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012

    def __init__(
        self,
        *,
        size: int = 7,
        num_colors: int = 8,
        num_walls: int = 4,
        max_steps: int = 100,
        tasks: TaskSpec | None = None,
        task: str | Sequence[int] | None = None,
        render_mode: str | None = None,
    ) -> None:
        _check_render_mode(render_mode, self.metadata)
        config = PinpadConfig(size=size, num_colors=num_colors, num_walls=num_walls, max_steps=max_steps)
        self.render_mode = render_mode
        self._episodes = _Episodes(config, tasks, task)
        self._grids: PinpadBatch | None = None
        self.observation_space = self._episodes.observation_space
        self.action_space = self._episodes.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode with a random layout and task; the same seed gives the same episodes."""
        super().reset(seed=seed)
        self._grids = self._episodes.start(1, self.np_random)
        return self._episodes.observe(self._grids)[0], self._info(self._grids)

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one action in 0..3."""
        grids = _started(self._grids)
        actions = torch.as_tensor(np.asarray(action)).reshape(1)
        check_actions(actions, 1)
        reward = float(grids.step(actions.to(torch.int64)))
        observation = self._episodes.observe(grids)[0]
        return observation, reward, bool(grids.terminated), bool(grids.truncated), self._info(grids)

    def render(self) -> np.ndarray | None:
        """Return a picture of the grid, uint8 (height, width, 3), or None without a render mode."""
        return self._episodes.render(_started(self._grids))[0] if self.render_mode else None

    @staticmethod
    def _info(grids: PinpadBatch) -> dict[str, Any]:
        task = tuple(grids.tasks[0, : int(grids.task_lengths)].tolist())
        return {"task": task, "colors_done": int(grids.colors_done), "subgoal": int(grids.next_color())}


class GridworldPinpadVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many grids of `GridworldPinpadEnv` that step together in a few tensor operations, for ``gymnasium.make_vec``.

    Spaces, rewards and endings are those of `GridworldPinpadEnv`, with a leading axis of ``num_envs``.

    Autoreset is ``NEXT_STEP``: the step after a grid has ended ignores its action, gives reward 0 and starts a new
    episode on a new layout.

    Info, for evaluation only, with Gymnasium's masks ``_task`` and so on: ``task``, int64 (num_envs, longest task)
    padded with -1; ``colors_done`` and ``subgoal``, int64 (num_envs,).

    Args:
        num_envs: number of grids.
        size, num_colors, num_walls, max_steps, tasks, task, render_mode: see `GridworldPinpadEnv`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 8,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        size: int = 7,
        num_colors: int = 8,
        num_walls: int = 4,
        max_steps: int = 100,
        tasks: TaskSpec | None = None,
        task: str | Sequence[int] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}: ask for at least one grid.")
        _check_render_mode(render_mode, self.metadata)
        config = PinpadConfig(size=size, num_colors=num_colors, num_walls=num_walls, max_steps=max_steps)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self._episodes = _Episodes(config, tasks, task)
        self._grids: PinpadBatch | None = None
        self.single_observation_space = self._episodes.observation_space
        self.single_action_space = self._episodes.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode in every grid; one integer seed determines the episodes of all."""
        super().reset(seed=seed)
        self._grids = self._episodes.start(self.num_envs, self.np_random)
        return self._episodes.observe(self._grids), self._info(self._grids)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one action per grid, integers (num_envs,) in 0..3; grids that had ended start a new episode instead."""
        grids = _started(self._grids)
        chosen = torch.as_tensor(np.asarray(actions))
        check_actions(chosen, self.num_envs)
        ended = (grids.terminated | grids.truncated).nonzero().squeeze(1)
        rewards = grids.step(chosen.to(torch.int64))
        if len(ended):
            grids.replace(ended, self._episodes.start(len(ended), self.np_random))
        return (
            self._episodes.observe(grids),
            rewards.numpy(),
            grids.terminated.numpy(),
            grids.truncated.numpy(),
            self._info(grids),
        )

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one picture per grid, or None without a render mode."""
        return tuple(self._episodes.render(_started(self._grids))) if self.render_mode else None

    def _info(self, grids: PinpadBatch) -> dict[str, Any]:
        values = {"task": grids.tasks, "colors_done": grids.colors_done, "subgoal": grids.next_color()}
        info: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
        return info | {f"_{name}": np.ones(self.num_envs, dtype=bool) for name in values}
