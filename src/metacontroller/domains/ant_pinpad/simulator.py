"""ant-pinpad as a batch of episodes that step together: MuJoCo moves the ants, tensors hold everything else.

Axes: b row, o object, l position in a task.
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
from metacontroller.domains.pinpad.episodes import PinpadEpisodes
from metacontroller.domains.pinpad.layouts import sample_layouts
from metacontroller.domains.pinpad.tasks import pad_tasks
from metacontroller.errors import UserError

STEP_SECONDS = 0.05
"""What an action lasts: five steps of MuJoCo, as in Gymnasium's ant."""
HEIGHT = (0.2, 1.0)
"""Heights of the torso within which the ant stands (§4)."""
START_HEIGHT = 0.75
"""That of MuJoCo's model."""
START_NOISE = 0.1


class AntBatch(PinpadEpisodes):
    """b ants that step together, see `PinpadEpisodes`.

    A colored cell counts as visited when the ant's center enters it from another cell. Entering a wall cell terminates
    the episode too, as does a torso whose height leaves 0.2..1.0, and leaving the plane (our choice; the paper is
    silent).

    state (b, 29) float64: MuJoCo's. cell (b,): the ant's. Tensors are on one device; MuJoCo works on the CPU.
    """

    row_fields = (*PinpadEpisodes.row_fields, "state", "cell", "observation")

    def __init__(
        self, arena: Arena, objects: Tensor, state: Tensor, tasks: Tensor, lengths: Tensor, threads: int = 0
    ) -> None:
        """tasks (b, l) padded with -1, lengths (b,). threads: of MuJoCo, 0: one a core."""
        super().__init__(arena, objects, tasks, lengths)
        self.arena, self.state, self.threads = arena, state, threads
        self.cell = arena.cell(state[:, :2])
        if bool((self.cell < 0).any()):
            raise UserError("a state lies beyond the plane; start the ant in a cell.")
        self.observation = observe(arena, state, self.cell, objects)

    def step(self, actions: Tensor) -> Tensor:
        """Applies torques, (b, 8) float within -1..1 or clipped to it; returns rewards, (b,) float32.

        UserError for another shape.
        """
        if actions.shape != (len(self), NUM_ACTIONS):
            raise UserError(f"actions have shape {tuple(actions.shape)}; expected ({len(self)}, {NUM_ACTIONS}).")
        before = self.cell
        running = ~(self.terminated | self.truncated)
        finite = self._move(actions, running)
        cell = torch.where(running & finite, self.arena.cell(self.state[:, :2]), before)
        entered = running & (cell != before)
        objects = torch.where(entered, self.objects_at(cell[:, None]).squeeze(1), -1)
        height = self.state[:, 2]
        upright = (height >= HEIGHT[0]) & (height <= HEIGHT[1]) & finite
        out = (objects >= self.arena.num_colors) | (cell < 0) | ~upright
        rewards = self.visit(torch.where(objects < self.arena.num_colors, objects, -1), running, running & out)
        self.cell = torch.where(cell >= 0, cell, before)  # that it left last
        self.observation = observe(self.arena, self.state, self.cell, self.objects)
        return rewards

    def _move(self, actions: Tensor, running: Tensor) -> Tensor:
        """Moves the running ants; (b,) bool: false where the simulation diverged and the state stayed."""
        rows = running.cpu().numpy().nonzero()[0]
        state, chosen = self.state.cpu().numpy(), actions.detach().cpu().numpy()
        moved = _physics(self.threads, os.getpid()).advance(state[rows], chosen[rows])
        finite = np.isfinite(moved).all(1)
        after, converged = state.copy(), np.ones(len(state), dtype=bool)
        after[rows[finite]], converged[rows[~finite]] = moved[finite], False
        self.state = torch.from_numpy(after).to(self.steps.device)
        return torch.from_numpy(converged).to(self.steps.device)

    def objects_at(self, cells: Tensor) -> Tensor:
        """(b, k) cells, -1 beyond the plane -> (b, k) int16: the object there, colors first, else -1."""
        return self._lookup.gather(1, cells.clamp(min=0)).masked_fill(cells < 0, -1)


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

    def uniform(columns: int, limit: float) -> Tensor:
        shape = (len(start), columns)
        values = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
        return 2 * limit * values - limit

    place = arena.center(start) + uniform(2, arena.cell_size / 2)
    half_yaw = uniform(1, arena.start_yaw / 2)
    still, height = torch.zeros_like(half_yaw), torch.full_like(half_yaw, START_HEIGHT)
    turned = [half_yaw.cos(), still, still, half_yaw.sin()]
    return torch.cat([place, height, *turned, uniform(STATE_SIZE - 7, START_NOISE)], 1)


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
    padded = F.pad(padded, (0, max(0, width - padded.shape[1])), value=-1)
    return AntBatch(arena, layouts.objects, state, padded, lengths, threads)
