"""ant-pinpad as a batch of episodes that step together: MuJoCo moves the ants, tensors hold everything else.

Axes: b row, o object, l position in a task, n cell.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.observation import NUM_ACTIONS, STATE_SIZE, observe
from metacontroller.domains.pinpad.layouts import object_lookup, sample_layouts
from metacontroller.domains.pinpad.tasks import pad_tasks
from metacontroller.errors import UserError

STEP_SECONDS = 0.05
"""What an action lasts: five steps of MuJoCo, as in Gymnasium's ant."""
HEIGHT = (0.2, 1.0)
"""Heights of the torso within which the ant stands (§4)."""
START_HEIGHT = 0.75
"""That of MuJoCo's model."""
START_NOISE = 0.1
ROW_FIELDS = (
    *("tasks", "task_lengths", "objects", "state", "cell", "observation"),
    *("subgoals_done", "steps", "terminated", "truncated", "_visited", "_lookup"),
)
"""The tensors of an `AntBatch`, with one row an episode."""


class AntBatch:
    """b ants that step together: the `BatchedEnv` of this world. Rows have layouts, tasks and endings of their own.

    A colored cell counts as visited when the ant's center enters it from another cell. Visiting the next color of the
    task advances it; visiting the last one terminates the episode with reward 1, visiting another color than the next
    with reward 0. Entering a wall cell terminates it too, as does a torso whose height leaves 0.2..1.0, and leaving the
    plane (our choice; the paper is silent). An episode that has not terminated is truncated after `Arena.max_steps`.
    An episode without a task asks for no color, and ends for no color.

    objects (b, o): cells of colors and walls. state (b, 29) float64: MuJoCo's. cell (b,): the ant's. Tensors are on one
    device; MuJoCo works on the CPU.
    """

    def __init__(
        self, arena: Arena, objects: Tensor, state: Tensor, tasks: Tensor, lengths: Tensor, threads: int = 0
    ) -> None:
        """tasks (b, l) padded with -1, lengths (b,). threads: of MuJoCo, 0: one a core."""
        self.arena, self.threads = arena, threads
        self.objects, self.state = objects, state
        self.tasks = torch.cat([tasks, torch.full_like(objects[:, :1], -1)], 1)  # a finished task has no next color
        self.task_lengths = lengths
        self.cell = arena.cell(state[:, :2])
        if bool((self.cell < 0).any()):
            raise UserError("a state lies beyond the plane; start the ant in a cell.")
        self.subgoals_done, self.steps = torch.zeros_like(lengths), torch.zeros_like(lengths)
        self.terminated = torch.zeros_like(lengths, dtype=torch.bool)
        self.truncated = torch.zeros_like(self.terminated)
        self._visited = torch.full_like(lengths, -1)
        self._lookup = object_lookup(arena, objects).long()
        self.observation = observe(arena, state, self.cell, objects)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def success(self) -> Tensor:
        """(b,) bool: whether the task is done; an episode without a task never is."""
        return (self.subgoals_done == self.task_lengths) & (self.task_lengths > 0)

    def step(self, actions: Tensor) -> Tensor:
        """Applies torques, (b, 8) float within -1..1 or clipped to it; returns rewards, (b,) float32.

        UserError for another shape.
        """
        if actions.shape != (len(self), NUM_ACTIONS):
            raise UserError(f"actions have shape {tuple(actions.shape)}; expected ({len(self)}, {NUM_ACTIONS}).")
        before, cell = self.success, self.cell
        running = ~(self.terminated | self.truncated)
        whole = self._move(actions, running)
        self.cell = torch.where(running & whole, self.arena.cell(self.state[:, :2]), cell)
        inside = self.cell >= 0
        entered = running & (self.cell != cell)
        found = torch.where(entered, self.objects_at(self.cell[:, None]).squeeze(1), -1)
        self._visited = torch.where(found < self.arena.num_colors, found, -1)
        correct = (self._visited >= 0) & (self._visited == self.goal())
        wrong = (self._visited >= 0) & ~correct & (self.task_lengths > 0)
        height = self.state[:, 2]
        upright = (height >= HEIGHT[0]) & (height <= HEIGHT[1]) & whole
        self.subgoals_done = self.subgoals_done + correct
        self.steps = self.steps + running
        out = (found >= self.arena.num_colors) | ~inside | ~upright
        # Reaching the last color counts also where the ant falls in that very step.
        self.terminated = self.terminated | (running & (self.success | wrong | out))
        self.truncated = (self.steps >= self.arena.max_steps) & ~self.terminated
        self.cell = torch.where(inside, self.cell, cell)  # that it left last
        self.observation = observe(self.arena, self.state, self.cell, self.objects)
        return (self.success & ~before).float()

    def _move(self, actions: Tensor, running: Tensor) -> Tensor:
        """Moves the running ants; (b,) bool: false where the simulation diverged and the state was kept."""
        rows = running.cpu().numpy().nonzero()[0]
        state, chosen = self.state.cpu().numpy(), actions.detach().cpu().numpy()
        moved = _physics(self.threads, os.getpid()).advance(state[rows], chosen[rows])
        finite = np.isfinite(moved).all(1)
        after, whole = state.copy(), np.ones(len(state), dtype=bool)
        after[rows[finite]], whole[rows[~finite]] = moved[finite], False
        self.state = torch.from_numpy(after).to(self.steps.device)
        return torch.from_numpy(whole).to(self.steps.device)

    def goal(self) -> Tensor:
        """(b,) int64: the color to visit next; -1 once the task is done, and without one."""
        return self.tasks.gather(1, self.subgoals_done[:, None]).squeeze(1)

    def objects_at(self, cells: Tensor) -> Tensor:
        """(b, k) cells, -1 beyond the plane -> (b, k) int64: the object there, colors first, else -1."""
        return self._lookup.gather(1, cells.clamp(min=0)).masked_fill(cells < 0, -1)

    def reached(self) -> Tensor:
        """(b,) int64: the color that the last step visited, asked for or not, else -1."""
        return self._visited

    def select(self, rows: Tensor) -> None:
        """Keeps the rows with these indices, in that order."""
        for name in ROW_FIELDS:
            setattr(self, name, getattr(self, name)[rows])

    def replace(self, rows: Tensor, other: AntBatch) -> None:
        """Puts the episodes of another batch in the place of ``rows`` (m,); UserError unless tasks are as long."""
        if other.tasks.shape != (len(rows), self.tasks.shape[1]):
            raise UserError(
                f"the new episodes have tasks of shape {tuple(other.tasks.shape)}; expected "
                f"({len(rows)}, {self.tasks.shape[1]}), one a replaced row and padded like this batch's."
            )
        for name in ROW_FIELDS:
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(other, name)))


@lru_cache(maxsize=4)
def _physics(threads: int, process: int) -> Any:
    """The `Physics` of this process with so many threads, shared by all batches."""
    from metacontroller.domains.ant_pinpad.engine import Physics

    return Physics(threads)


def sample_states(arena: Arena, start: Tensor, generator: torch.Generator) -> Tensor:
    """States (b, 29) at the start of an episode in the cells start (b,), float64.

    Uniform place in the cell and uniform yaw, within `Arena.start_yaw`; joint angles and all velocities uniform within
    0.1 of zero (§4).
    """
    count, device = len(start), generator.device

    def uniform(columns: int, low: float, high: float) -> Tensor:
        values = torch.rand((count, columns), generator=generator, device=device, dtype=torch.float64)
        return low + (high - low) * values

    place = arena.center(start) + uniform(2, -arena.cell_size / 2, arena.cell_size / 2)
    half_yaw = uniform(1, -arena.start_yaw / 2, arena.start_yaw / 2)
    still = torch.zeros_like(half_yaw)
    height = torch.full_like(half_yaw, START_HEIGHT)
    turned = torch.cat([half_yaw.cos(), still, still, half_yaw.sin()], 1)
    return torch.cat([place, height, turned, uniform(STATE_SIZE - 7, -START_NOISE, START_NOISE)], 1)


def start_ants(
    arena: Arena,
    tasks: Sequence[Sequence[int]],
    generator: torch.Generator,
    threads: int = 0,
    *,
    width: int = 0,
) -> AntBatch:
    """An episode for each of the tasks, on a random layout; () is none. width: tasks are padded to at least that."""
    layouts = sample_layouts(arena, len(tasks), generator)
    state = sample_states(arena, layouts.agent, generator)
    padded, lengths = pad_tasks(tasks, generator.device)
    padded = F.pad(padded.long(), (0, max(0, width - padded.shape[1])), value=-1)
    return AntBatch(arena, layouts.objects, state, padded, lengths, threads)
