"""gridworld-pinpad as a batched simulator: thousands of grids step together in a few tensor operations on any device.

Rules (arXiv 2512.20605): a grid of size x size cells holds colored cells, walls and one agent, which must visit the
colors of a task in order. Cells are numbered ``row * size + column``; actions are 0 up, 1 down, 2 left, 3 right. Moving
into a wall or off the grid changes nothing.

Axes: b grid of the batch, o object (every color, then every wall), n cell, l position in a task, v subgoal of the
vocabulary, u color of a subgoal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.domains.base import BatchedEnv
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, move_table
from metacontroller.domains.pinpad.layouts import Layouts, check_layouts, object_lookup, sample_layouts
from metacontroller.domains.pinpad.tasks import Task, single_colors
from metacontroller.errors import UserError
from metacontroller.ranges import COUNT, check_number, shown

NUM_ACTIONS = 4


class PinpadBatch(BatchedEnv):
    """A batch of grids that step together; each has its own layout and task and ends on its own.

    A colored cell counts as visited when the agent moves onto it from another cell; a move that changes nothing while
    standing on it does not. Visiting the next color of the task advances it; visiting the last one terminates the
    episode with reward 1, visiting any other color than the next terminates it with reward 0. An episode that has
    not terminated is truncated after `PinpadConfig.max_steps` steps. A grid that has ended stays as it is.

    Subgoals are the units of tasks: single colors, or runs of equally many colors (`subgoal_vocabulary`). They change
    no rule, only what `goal`, `subgoals_done` and `reached` return.

    Attributes:
        config: the grid's configuration.
        layouts: the layouts at the start of the episodes.
        tasks, task_lengths: int64 (b, l), padded with -1, and (b,).
        subgoals: the vocabulary, by default every color of the grid.
        agent: int64 (b,), the agent's cell.
        colors_done: int64 (b,), colors of the task visited so far.
        steps: int64 (b,), steps taken before the episode ended.
        terminated, truncated: bool (b,), never both.
    """

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
        _check_task_tensors(config, len(layouts), tasks, task_lengths)
        self.subgoals = single_colors(config.num_colors) if subgoals is None else tuple(subgoals)
        _check_subgoals(config, self.subgoals)
        device = layouts.agent.device
        self.config = config
        self.layouts = layouts
        self.tasks = tasks
        self.task_lengths = task_lengths
        self.agent = layouts.agent.clone()
        self.colors_done = torch.zeros_like(self.agent)
        self.steps = torch.zeros_like(self.agent)
        self.terminated = torch.zeros_like(self.agent, dtype=torch.bool)
        self.truncated = torch.zeros_like(self.terminated)
        self._lookup = object_lookup(config, layouts.objects)
        self._visited = torch.full_like(self.agent, -1, dtype=torch.int16)
        # One more column, so that a finished task has a next color too: one that nothing equals.
        self._next_colors = torch.cat([tasks, torch.full_like(tasks[:, :1], -1)], dim=1).to(torch.int16)
        self._moves = move_table(config.size, device).flatten()
        self._vocabulary = torch.tensor(self.subgoals, dtype=torch.int16, device=device)  # (v, u)
        # The u - 1 colors visited last before the last step, (b,) each, oldest first; -1 where there were fewer.
        self._recent = [self._visited] * (self.colors_per_subgoal - 1)

    def __len__(self) -> int:
        return len(self.agent)

    @property
    def colors_per_subgoal(self) -> int:
        """Number of colors in a subgoal."""
        return len(self.subgoals[0])

    @property
    def success(self) -> Tensor:
        """bool (b,): whether the task is done."""
        return self.colors_done == self.task_lengths

    @property
    def subgoals_done(self) -> Tensor:
        """int64 (b,): number of whole subgoals of the task done so far."""
        return self.colors_done // self.colors_per_subgoal

    def step(self, actions: Tensor) -> Tensor:
        """Apply one action per grid, int64 (b,) in 0..3, and return the rewards, float32 (b,).

        UserError for a wrong shape or type, and on the CPU for values out of range; elsewhere those are not checked,
        since that would synchronize with the device: see `check_actions`.
        """
        if not isinstance(actions, Tensor) or actions.dtype != torch.int64:
            raise UserError(f"actions are {shown(actions)}: expected an int64 tensor, one per grid.")
        if actions.shape != self.agent.shape:
            raise UserError(f"actions have shape {tuple(actions.shape)}: expected one per grid, ({len(self)},).")
        if actions.device.type == "cpu" and len(actions):
            check_actions(actions, len(self))
        ahead = self._moves[actions * self.config.num_cells + self.agent]
        objects = self._lookup.gather(1, ahead[:, None]).squeeze(1)
        ended = self.terminated | self.truncated
        if self._recent:
            visit, newer = self._visited >= 0, [*self._recent[1:], self._visited]
            self._recent = [torch.where(visit, *colors) for colors in zip(newer, self._recent, strict=True)]
        agent = torch.where((objects >= self.config.num_colors) | ended, self.agent, ahead)
        self._visited = torch.where(agent != self.agent, objects, -1)
        entered = self._visited >= 0
        correct = entered & (self._visited == self.next_color())
        self.agent = agent
        self.colors_done = self.colors_done + correct
        self.steps = self.steps + ~ended
        success = correct & (self.colors_done == self.task_lengths)
        self.terminated = self.terminated | success | (entered & ~correct)
        self.truncated = (self.steps >= self.config.max_steps) & ~self.terminated
        return success.to(torch.float32)

    @property
    def observation(self) -> Tensor:
        """Tokens, see `observe_tokens`."""
        return self.observe_tokens()

    def observe_tokens(self) -> Tensor:
        """Return int64 (b, o + 1): the cell of each color, of each wall, and of the agent."""
        return torch.cat([self.layouts.objects, self.agent[:, None]], dim=1)

    def visited_color(self) -> Tensor:
        """Return int64 (b,): the color visited by the last step, -1 where there was none."""
        return self._visited.to(torch.int64)

    def next_color(self) -> Tensor:
        """Return int64 (b,): the color to visit next, -1 once the task is done."""
        return self._next_colors.gather(1, self.colors_done[:, None]).squeeze(1).to(torch.int64)

    def task_goals(self) -> Tensor:
        """Return int64 (b, l / u + 1): index of each subgoal of the task, -1 for none, as at the end."""
        longest, unit = self.tasks.shape[1], self.colors_per_subgoal
        padded = F.pad(self.tasks, (0, unit + -longest % unit), value=-1)
        return self._index_of(padded.unflatten(1, (-1, unit)))

    def goal(self) -> Tensor:
        """Return int64 (b,): index of the current subgoal, until all its colors are visited.

        -1 once the task is done, and where the vocabulary lacks the subgoal.
        """
        return self.task_goals().gather(1, self.subgoals_done[:, None]).squeeze(1)

    def reached(self) -> Tensor:
        """Return int64 (b,): index of the subgoal that the last step completed, part of the task or not, else -1.

        A subgoal of one color is completed by visiting it, one of several when the last colors visited are its colors.
        """
        return self._index_of(torch.stack([*self._recent, self._visited], dim=1))

    def _index_of(self, chunks: Tensor) -> Tensor:
        """Index in the vocabulary of chunks of colors (..., u), -1 where they are not in it."""
        equal = (chunks[..., None, :] == self._vocabulary).all(-1)
        return torch.where(equal.any(-1), equal.to(torch.uint8).argmax(-1), -1)

    def select(self, rows: Tensor) -> None:
        """Keep only the grids of the given rows (indices or a boolean mask), in that order."""
        self.layouts = self.layouts.index(rows)
        for name in _ROW_FIELDS:
            setattr(self, name, getattr(self, name)[rows])
        self._recent = [colors[rows] for colors in self._recent]

    def replace(self, rows: Tensor, other: PinpadBatch) -> None:
        """Replace the grids of rows, int64 (k,), by those of another batch.

        UserError unless it has the same subgoals and tasks padded to the same length.
        """
        if other.subgoals != self.subgoals:
            raise UserError(f"the new grids have subgoals {other.subgoals}: expected {self.subgoals}, as here.")
        if other.tasks.shape != (len(rows), self.tasks.shape[1]):
            raise UserError(
                f"the new grids have tasks of shape {tuple(other.tasks.shape)}: expected "
                f"({len(rows)}, {self.tasks.shape[1]}), one per replaced row and padded to this batch's width."
            )
        old, new = self.layouts, other.layouts
        self.layouts = Layouts(old.objects.index_copy(0, rows, new.objects), old.agent.index_copy(0, rows, new.agent))
        for name in _ROW_FIELDS:
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(other, name)))
        self._recent = [old.index_copy(0, rows, new) for old, new in zip(self._recent, other._recent, strict=True)]


class FreePinpadBatch(PinpadBatch):
    """Grids without a task: episodes end only at the time limit.

    config, layouts, subgoals: see `PinpadBatch`.
    """

    def __init__(self, config: PinpadConfig, layouts: Layouts, *, subgoals: Sequence[Task] | None = None) -> None:
        any_color = torch.zeros_like(layouts.agent)
        super().__init__(config, layouts, any_color[:, None], torch.ones_like(any_color), subgoals=subgoals)

    @property
    def success(self) -> Tensor:
        """bool (b,): always false, since there is no task."""
        return torch.zeros_like(self.terminated)

    @property
    def subgoals_done(self) -> Tensor:
        """int64 (b,): always 0, since there is no task."""
        return torch.zeros_like(self.steps)

    def step(self, actions: Tensor) -> Tensor:
        """Apply one action per grid and return rewards of 0."""
        rewards = super().step(actions)
        self.terminated = torch.zeros_like(self.terminated)
        self.truncated = self.steps >= self.config.max_steps
        return torch.zeros_like(rewards)

    def goal(self) -> Tensor:
        """Return int64 (b,): always -1, since there is no task."""
        return torch.full_like(self.steps, -1)


def start_grids(
    config: PinpadConfig,
    task: Sequence[int],
    n: int,
    generator: torch.Generator,
    subgoals: Sequence[Task] | None = None,
) -> PinpadBatch:
    """Return n grids with random layouts and the same task. subgoals: the vocabulary, see `PinpadBatch`."""
    check_number("n", n, COUNT)
    tasks = torch.tensor([task]).expand(n, -1).to(generator.device)
    lengths = torch.full((n,), len(task), device=generator.device)
    layouts = sample_layouts(config, n, generator, generator.device)
    return PinpadBatch(config, layouts, tasks, lengths, subgoals=subgoals)


_ROW_FIELDS = (
    "tasks",
    "task_lengths",
    "agent",
    "colors_done",
    "steps",
    "terminated",
    "truncated",
    "_lookup",
    "_visited",
    "_next_colors",
)
"""The tensors of a `PinpadBatch` with one row per grid, other than its layouts and recent visits."""


def _check_task_tensors(config: PinpadConfig, batch: int, tasks: Tensor, task_lengths: Tensor) -> None:
    if tasks.ndim != 2 or len(tasks) != batch or task_lengths.shape != (batch,):
        raise UserError(
            f"tasks have shape {tuple(tasks.shape)} and task_lengths {tuple(task_lengths.shape)}: expected "
            f"({batch}, longest task) and ({batch},), one task per grid."
        )
    if ((task_lengths < 1) | (task_lengths > tasks.shape[1])).any():
        raise UserError(f"a task length lies outside 1..{tasks.shape[1]}: count the colors of each task.")
    used = torch.arange(tasks.shape[1], device=tasks.device) < task_lengths[:, None]
    if (used & ((tasks < 0) | (tasks >= config.num_colors))).any():
        raise UserError(f"a task has an unknown color: colors run from 0 to {config.num_colors - 1}.")


def _check_subgoals(config: PinpadConfig, subgoals: tuple[Task, ...]) -> None:
    if not subgoals or len({len(subgoal) for subgoal in subgoals}) > 1 or not subgoals[0]:
        raise UserError(f"subgoals are {subgoals}: give at least one, each of as many colors, and of one at least.")
    if not all(0 <= color < config.num_colors for subgoal in subgoals for color in subgoal):
        raise UserError(f"subgoals {subgoals} have an unknown color: colors run from 0 to {config.num_colors - 1}.")


def check_actions(actions: Tensor, batch: int) -> None:
    """UserError unless the actions are one integer in 0..3 per grid."""
    if actions.shape != (batch,) or actions.is_floating_point():
        raise UserError(
            f"actions have shape {tuple(actions.shape)} and type {actions.dtype}: expected ({batch},) integers."
        )
    low, high = (int(value) for value in actions.aminmax())
    if low < 0 or high >= NUM_ACTIONS:
        raise UserError(
            f"action {low if low < 0 else high} is out of range: take 0 (up), 1 (down), 2 (left) or 3 (right)."
        )
