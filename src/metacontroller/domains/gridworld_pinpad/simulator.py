"""gridworld-pinpad as a batched simulator: thousands of grids step together in a few tensor operations on any device.

Rules (arXiv 2512.20605): a grid of size x size cells holds colored cells, walls and one agent, which must visit the
colors of a task in order. Cells are numbered ``row * size + column``; actions are 0 up, 1 down, 2 left, 3 right. Moving
into a wall or off the grid changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, move_table
from metacontroller.domains.pinpad.episodes import PinpadEpisodes
from metacontroller.domains.pinpad.layouts import Layouts, check_layouts, sample_layouts
from metacontroller.domains.pinpad.tasks import Task, pad_tasks
from metacontroller.errors import UserError
from metacontroller.ranges import Count, check, shown

NUM_ACTIONS = 4


class PinpadBatch(PinpadEpisodes):
    """A batch of grids that step together, see `PinpadEpisodes`.

    A colored cell counts as visited when the agent moves onto it from another cell; a move that changes nothing while
    standing on it does not. layouts: at the start. agent: int64 (b,), the agent's cell.
    """

    row_fields = (*PinpadEpisodes.row_fields, "agent")
    board: PinpadConfig

    def __init__(
        self,
        config: PinpadConfig,
        layouts: Layouts,
        tasks: Tensor,
        task_lengths: Tensor,
        *,
        subgoals: Sequence[Task] | None = None,
    ) -> None:
        check_layouts(config, layouts)
        super().__init__(config, layouts.objects, tasks, task_lengths, subgoals)
        self.agent = layouts.agent.clone()
        self._moves = move_table(config.size, self.agent.device).flatten()

    def step(self, actions: Tensor) -> Tensor:
        """Apply one action per grid, int64 (b,) in 0..3, and return the rewards, float32 (b,).

        UserError for a wrong shape or type, and on the CPU for values out of range; elsewhere those are not checked,
        since that would synchronize with the device: see `check_actions`.
        """
        if not isinstance(actions, Tensor) or actions.dtype != torch.int64:
            raise UserError(f"actions are {shown(actions)}; expected an int64 tensor, one per grid.")
        if actions.shape != self.agent.shape:
            raise UserError(f"actions have shape {tuple(actions.shape)}; expected one per grid, ({len(self)},).")
        if actions.device.type == "cpu" and len(actions):
            check_actions(actions, len(self))
        ahead = self._moves[actions * self.board.num_cells + self.agent]
        objects = self._lookup.gather(1, ahead[:, None]).squeeze(1)
        ended = self.terminated | self.truncated
        before = self.agent
        self.agent = torch.where((objects >= self.board.num_colors) | ended, before, ahead)
        return self.visit(torch.where(self.agent != before, objects, -1), ~ended)

    @property
    def observation(self) -> Tensor:
        """Tokens, see `observe_tokens`."""
        return self.observe_tokens()

    def observe_tokens(self) -> Tensor:
        """Return int64 (b, o + 1): the cell of each color, of each wall, and of the agent."""
        return torch.cat([self.objects, self.agent[:, None]], dim=1)


def start_grids(
    config: PinpadConfig,
    task: Sequence[int],
    n: int,
    generator: torch.Generator,
    subgoals: Sequence[Task] | None = None,
) -> PinpadBatch:
    """Return n grids with random layouts and the same task, () for none. subgoals: see `PinpadEpisodes`."""
    check("n", n, Count)
    tasks, lengths = pad_tasks([task], generator.device)
    layouts = sample_layouts(config, n, generator)
    return PinpadBatch(config, layouts, tasks.expand(n, -1), lengths.expand(n), subgoals=subgoals)


def check_actions(actions: Tensor, batch: int) -> None:
    """UserError unless the actions are one integer in 0..3 per grid."""
    if actions.shape != (batch,) or actions.is_floating_point():
        raise UserError(
            f"actions have shape {tuple(actions.shape)} and type {actions.dtype}; expected ({batch},) integers."
        )
    low, high = (int(value) for value in actions.aminmax())
    if low < 0 or high >= NUM_ACTIONS:
        raise UserError(
            f"action {low if low < 0 else high} is out of range; take 0 (up), 1 (down), 2 (left) or 3 (right)."
        )
