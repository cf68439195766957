"""ant-pinpad as Gymnasium environments: one ant, or many that step together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from metacontroller.domains.ant_pinpad.layouts import Arena, Camera
from metacontroller.domains.ant_pinpad.observation import NUM_ACTIONS, observation_size
from metacontroller.domains.ant_pinpad.rendering import painter
from metacontroller.domains.ant_pinpad.simulator import STEP_SECONDS, AntBatch, start_ants
from metacontroller.domains.pinpad.gymnasium import EpisodeFactory, PinpadEnv, PinpadVectorEnv
from metacontroller.ranges import check

LIMIT = 25.0
"""Of observations: MuJoCo gives up on numbers beyond 1e10, whose symlog is 23."""


class _Ants(EpisodeFactory):
    """camera: see `AntPinpadEnv`. threads: of MuJoCo."""

    Board = Arena
    table = "A2"
    board: Arena

    def __init__(self, *, camera: str = "above", threads: int = 0, **options: Any) -> None:
        super().__init__(**options)
        check("camera", camera, Camera)
        self.camera, self.threads = camera, threads
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (observation_size(self.board),), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (NUM_ACTIONS,), np.float32)
        self.longest = max(map(len, self.tasks))

    def begin(self, drawn: Tensor, generator: torch.Generator) -> AntBatch:
        tasks = [self.tasks[number] for number in drawn.tolist()]
        return start_ants(self.board, tasks, generator, self.threads, width=self.longest)

    def actions(self, actions: np.ndarray, n: int) -> Tensor:
        return torch.as_tensor(actions)  # `AntBatch` refuses other shapes

    def pictures(self, batch: AntBatch) -> list[np.ndarray]:
        brush = painter(self.board)
        return [brush.draw(*row, self.camera) for row in zip(batch.state, batch.objects, strict=True)]


class AntPinpadEnv(PinpadEnv):
    """ant-pinpad, ``metacontroller/AntPinpad-v0``: walk to the colors of a hidden task in order.

    World: a plane of ``size`` x ``size`` cells, each ``cell_size`` meters a side, with ``num_colors`` colored cells and
    ``num_walls`` wall cells, all placed at random without overlap at each reset, and MuJoCo's ant in a free cell. Cells
    are no bodies: the ant can walk into a wall, which ends the episode. Layouts in which some color cannot be reached
    from the start, or from another color, without crossing a wall or another color are sampled again (our choice; the
    paper is silent). The ant starts anywhere in its cell, with any yaw within ``start_yaw`` of zero, joint angles and
    velocities within 0.1 of it.

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
        plane: fields of `Arena`: size, num_colors, num_walls, max_steps, cell_size, start_yaw.
        tasks: from which the task of an episode is sampled: "A2" (the default), the paper's table, or a list.
        task: the one task of every episode, such as "0-1-2-3", instead of `tasks`.
        render_mode: None or "rgb_array".
        camera: "above", or "follow" for one that stays with the ant.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": round(1 / STEP_SECONDS)}  # noqa: RUF012
    packages = ("mujoco",)
    """For the record of `storage.versions`."""
    Episodes = _Ants

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"threads": 1, **options})


class AntPinpadVectorEnv(PinpadVectorEnv):
    """Many ants of `AntPinpadEnv` that step together on MuJoCo's threads, for ``gymnasium.make_vec``.

    Spaces, rewards and endings are those of `AntPinpadEnv`, with a leading axis of ``num_envs``.

    Autoreset is ``NEXT_STEP``: the step after an episode has ended ignores its action, gives reward 0 and starts a new
    one on a new layout.

    Info, for evaluation only, with Gymnasium's masks ``_task`` and so on: ``task``, int64 (num_envs, longest task)
    padded with -1; ``colors_done`` and ``subgoal``, int64 (num_envs,).

    Args:
        num_envs: number of ants.
        tasks, task, render_mode, camera, plane: see `AntPinpadEnv`.
        threads: of MuJoCo; 0 is one a core. The episodes do not depend on it.
    """

    metadata: dict[str, Any] = {**AntPinpadEnv.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    Episodes = _Ants
