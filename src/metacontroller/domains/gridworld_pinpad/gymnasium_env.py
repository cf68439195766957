"""gridworld-pinpad as Gymnasium environments: one grid, or many that step together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, tokens_to_onehot
from metacontroller.domains.gridworld_pinpad.rendering import render_rgb
from metacontroller.domains.gridworld_pinpad.simulator import NUM_ACTIONS, PinpadBatch, check_actions
from metacontroller.domains.pinpad.gymnasium import EpisodeFactory, PinpadEnv, PinpadVectorEnv
from metacontroller.domains.pinpad.layouts import sample_layouts
from metacontroller.domains.pinpad.tasks import pad_tasks


class _Grids(EpisodeFactory):
    Board = PinpadConfig
    table = "A1"
    board: PinpadConfig

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.padded, self.lengths = pad_tasks(self.tasks)
        self.observation_space = spaces.Box(0.0, 1.0, (self.board.observation_size,), np.float32)
        self.action_space = spaces.Discrete(NUM_ACTIONS)

    def begin(self, drawn: Tensor, generator: torch.Generator) -> PinpadBatch:
        layouts = sample_layouts(self.board, len(drawn), generator)
        return PinpadBatch(self.board, layouts, self.padded[drawn], self.lengths[drawn])

    def observe(self, batch: PinpadBatch) -> np.ndarray:
        """The paper's observation vectors, float32 (n, observation_size)."""
        return tokens_to_onehot(self.board, batch.observe_tokens()).numpy()

    def actions(self, actions: np.ndarray, n: int) -> Tensor:
        chosen = torch.as_tensor(actions)
        check_actions(chosen, n)
        return chosen.to(torch.int64)

    def pictures(self, batch: PinpadBatch) -> list[np.ndarray]:
        return [render_rgb(self.board, row[:-1], row[-1]) for row in batch.observe_tokens().tolist()]


class GridworldPinpadEnv(PinpadEnv):
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
    Episodes = _Grids


class GridworldPinpadVectorEnv(PinpadVectorEnv):
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

    metadata: dict[str, Any] = {**GridworldPinpadEnv.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    Episodes = _Grids
