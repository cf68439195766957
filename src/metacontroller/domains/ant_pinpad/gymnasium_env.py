"""ant-pinpad as Gymnasium environments: one ant, or many that step together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from metacontroller.domains.ant_pinpad.layouts import CAMERAS, Arena
from metacontroller.domains.ant_pinpad.observation import NUM_ACTIONS, observation_size
from metacontroller.domains.ant_pinpad.rendering import painter
from metacontroller.domains.ant_pinpad.simulator import AntBatch, start_ants
from metacontroller.domains.pinpad_tasks import Task, check_tasks, read_tasks
from metacontroller.errors import UserError

TaskSpec = str | Iterable[str | Sequence[int]]
LIMIT = 25.0
"""Of observations: MuJoCo gives up on numbers beyond 1e10, whose symlog is 23."""
FRAMES_PER_SECOND = 20
"""A step of the world is 0.05 s."""


class _Episodes:
    """Shared by the two environments: the plane, the tasks, the start of an episode, and pictures."""

    def __init__(
        self,
        arena: Arena,
        tasks: TaskSpec | None,
        task: str | Sequence[int] | None,
        render_mode: str | None,
        camera: str,
        threads: int,
    ) -> None:
        if tasks is not None and task is not None:
            raise UserError("both tasks and task were given; give tasks to sample from, or the one of every episode.")
        if render_mode not in (None, "rgb_array"):
            raise UserError(f"render_mode is {render_mode!r}; expected 'rgb_array' or None.")
        if camera not in CAMERAS:
            raise UserError(f"camera is {camera!r}; expected one of {', '.join(map(repr, CAMERAS))}.")
        self.arena, self.render_mode, self.camera, self.threads = arena, render_mode, camera, threads
        self.tasks: tuple[Task, ...] = (
            read_tasks("A2" if tasks is None else tasks) if task is None else (read_tasks([task]))
        )
        check_tasks(self.tasks, arena.num_colors)
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (observation_size(arena),), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (NUM_ACTIONS,), np.float32)
        self.longest = max(map(len, self.tasks))

    def start(self, n: int, random: np.random.Generator) -> AntBatch:
        """n new episodes; all their randomness comes from the numpy generator."""
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        drawn = torch.randint(len(self.tasks), (n,), generator=generator).tolist()
        return start_ants(self.arena, [self.tasks[i] for i in drawn], generator, self.threads, width=self.longest)

    def render(self, ants: AntBatch | None) -> list[np.ndarray] | None:
        """A picture of each episode; None without a render mode."""
        if self.render_mode is None:
            return None
        brush, ants = painter(self.arena), started(ants)
        return [brush.draw(*row, self.camera) for row in zip(ants.state, ants.objects, strict=True)]


def started(ants: AntBatch | None) -> AntBatch:
    """The episodes; RuntimeError before the first."""
    if ants is None:
        raise RuntimeError("no episode has started: call reset() before step() or render().")
    return ants


class AntPinpadEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """ant-pinpad, ``metacontroller/AntPinpad-v0``: walk to the colors of a hidden task in order.

    World: a plane of ``size`` x ``size`` cells, each ``cell_size`` meters a side, with ``num_colors`` colored cells and
    ``num_walls`` wall cells, all placed at random without overlap at each reset, and MuJoCo's ant in a free cell. Cells
    are no bodies: the ant can walk into a wall, which ends the episode. Layouts in which some color cannot be reached
    from the start, or from another color, without crossing a wall or another color are sampled again (our choice; the
    paper is silent). The ant starts anywhere in its cell, with any yaw, joint angles and velocities within 0.1 of zero.

    Action space: ``Box(-1, 1, (8,), float32)``: the torques, as shares of the motors', in the order of Gymnasium's
    Ant-v5. An action lasts 0.05 s, five steps of MuJoCo.

    Observation space: ``Box(-25, 25, (31 + 2 (num_colors + num_walls),), float32)``, see the table in
    `observation.py`. The task is not observed.

    Reward: 1 on the step that visits the last color of the task, else 0. A colored cell is visited when the ant's
    center enters it from another cell.

    Endings: ``terminated`` on success, on visiting a color that is not the next of the task, when the center enters a
    wall or leaves the plane (our choice), and when the torso's height leaves 0.2..1.0 m; ``truncated`` after
    ``max_steps`` steps otherwise. After that the ant stays as it is, with reward 0, until reset.

    Info, for evaluation only: ``task`` (its colors), ``colors_done`` (colors visited so far) and ``subgoal`` (the next
    color, -1 once the task is done).

    Versions: v0, as described here, after the ant of arXiv 2512.20605. MuJoCo's own version matters too.

    Args:
        size, num_colors, num_walls, max_steps, cell_size: see `Arena`.
        tasks: from which the task of an episode is sampled: "A2" (the default), the paper's table, or a list.
        task: the one task of every episode, such as "0-1-2-3", instead of `tasks`.
        render_mode: None or "rgb_array".
        camera: "above", or "follow" for one that stays with the ant.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": FRAMES_PER_SECOND}  # noqa: RUF012

    def __init__(
        self,
        *,
        size: int = 4,
        num_colors: int = 4,
        num_walls: int = 1,
        max_steps: int = 500,
        cell_size: float = 2.0,
        tasks: TaskSpec | None = None,
        task: str | Sequence[int] | None = None,
        render_mode: str | None = None,
        camera: str = "above",
    ) -> None:
        arena = Arena(size=size, num_colors=num_colors, num_walls=num_walls, max_steps=max_steps, cell_size=cell_size)
        self.render_mode = render_mode
        self._episodes = _Episodes(arena, tasks, task, render_mode, camera, threads=1)
        self._ants: AntBatch | None = None
        self.observation_space = self._episodes.observation_space
        self.action_space = self._episodes.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode with a random layout and task; the same seed gives the same episodes."""
        super().reset(seed=seed)
        self._ants = self._episodes.start(1, self.np_random)
        return self._ants.observation[0].numpy(), self._info(self._ants)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Applies torques (8,) for 0.05 s."""
        ants = started(self._ants)
        reward = float(ants.step(torch.as_tensor(np.asarray(action)[None])))
        observation = ants.observation[0].numpy()
        return observation, reward, bool(ants.terminated), bool(ants.truncated), self._info(ants)

    def render(self) -> np.ndarray | None:
        """A picture, uint8 (224, 224, 3); None without a render mode."""
        pictures = self._episodes.render(self._ants)
        return None if pictures is None else pictures[0]

    @staticmethod
    def _info(ants: AntBatch) -> dict[str, Any]:
        task = tuple(ants.tasks[0, : int(ants.task_lengths)].tolist())
        return {"task": task, "colors_done": int(ants.subgoals_done), "subgoal": int(ants.goal())}


class AntPinpadVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many ants of `AntPinpadEnv` that step together on MuJoCo's threads, for ``gymnasium.make_vec``.

    Spaces, rewards and endings are those of `AntPinpadEnv`, with a leading axis of ``num_envs``.

    Autoreset is ``NEXT_STEP``: the step after an episode has ended ignores its action, gives reward 0 and starts a new
    one on a new layout.

    Info, for evaluation only, with Gymnasium's masks ``_task`` and so on: ``task``, int64 (num_envs, longest task)
    padded with -1; ``colors_done`` and ``subgoal``, int64 (num_envs,).

    Args:
        num_envs: number of ants.
        size, num_colors, num_walls, max_steps, cell_size, tasks, task, render_mode, camera: see `AntPinpadEnv`.
        threads: of MuJoCo; 0 is one a core. The episodes do not depend on it.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": FRAMES_PER_SECOND,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        size: int = 4,
        num_colors: int = 4,
        num_walls: int = 1,
        max_steps: int = 500,
        cell_size: float = 2.0,
        tasks: TaskSpec | None = None,
        task: str | Sequence[int] | None = None,
        render_mode: str | None = None,
        camera: str = "above",
        threads: int = 0,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; ask for at least one ant.")
        arena = Arena(size=size, num_colors=num_colors, num_walls=num_walls, max_steps=max_steps, cell_size=cell_size)
        self.num_envs, self.render_mode = num_envs, render_mode
        self._episodes = _Episodes(arena, tasks, task, render_mode, camera, threads)
        self._ants: AntBatch | None = None
        self.single_observation_space = self._episodes.observation_space
        self.single_action_space = self._episodes.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every row; one integer seed determines the episodes of all."""
        super().reset(seed=seed)
        self._ants = self._episodes.start(self.num_envs, self.np_random)
        return self._ants.observation.numpy(), self._info(self._ants)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Applies torques (num_envs, 8); rows that had ended start a new episode instead."""
        ants = started(self._ants)
        ended = (ants.terminated | ants.truncated).nonzero().squeeze(1)
        rewards = ants.step(torch.as_tensor(np.asarray(actions)))
        if len(ended):
            ants.replace(ended, self._episodes.start(len(ended), self.np_random))
        return (
            ants.observation.numpy(),
            rewards.numpy(),
            ants.terminated.numpy(),
            ants.truncated.numpy(),
            self._info(ants),
        )

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture of each row; None without a render mode."""
        pictures = self._episodes.render(self._ants)
        return None if pictures is None else tuple(pictures)

    def _info(self, ants: AntBatch) -> dict[str, Any]:
        values = {"task": ants.tasks[:, :-1], "colors_done": ants.subgoals_done, "subgoal": ants.goal()}
        info: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
        return info | {f"_{name}": np.ones(self.num_envs, dtype=bool) for name in values}
