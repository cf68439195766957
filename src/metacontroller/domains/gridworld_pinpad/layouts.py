"""Grids as data: their size, where moves lead, the paper's observation vector, and the symmetries of the square.

Cells are numbered ``row * size + column``. Axes: b grid of the batch, o object (every color, then every wall), n cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from metacontroller.domains.pinpad.layouts import Board, Side
from metacontroller.errors import UserError
from metacontroller.ranges import Steps, Width, WidthOr0


@dataclass(frozen=True, kw_only=True)
class PinpadConfig(Board):
    """Size and content of a grid; the defaults are the paper's. UserError for values that do not fit together."""

    surface, walker = "grid", "agent"

    size: Side = 7
    num_colors: Width = 8
    num_walls: WidthOr0 = 4
    max_steps: Steps = 100

    @property
    def observation_size(self) -> int:
        """Length of the paper's observation vector, size² (walls + colors + 1)."""
        return self.num_cells * (self.num_objects + 1)


@cache
def _move_table(size: int) -> Tensor:
    cells = torch.arange(size * size).view(size, size)
    up = torch.cat([cells[:1], cells[:-1]])
    down = torch.cat([cells[1:], cells[-1:]])
    left = torch.cat([cells[:, :1], cells[:, :-1]], dim=1)
    right = torch.cat([cells[:, 1:], cells[:, -1:]], dim=1)
    return torch.stack([up, down, left, right]).flatten(1)


def move_table(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return int64 (4, n): the cell that each action leads to from each cell when there are no walls."""
    return _move_table(size).to(device)


def tokens_to_onehot(config: PinpadConfig, tokens: Tensor) -> Tensor:
    """Convert tokens, int64 (..., o + 1), to the paper's observation vector, float32 (..., size² (o + 1)).

    Order: one block of size² entries per color, then per wall, then for the agent; within a block the cells in row
    order. So the vector viewed as (o + 1, size, size) is an image with one channel per object. UserError for a wrong
    number of tokens.
    """
    if tokens.shape[-1:] != (config.num_objects + 1,):
        raise UserError(
            f"tokens have shape {tuple(tokens.shape)}: expected {config.num_objects + 1} in the last axis, "
            "one cell per color and wall, and the agent's."
        )
    starts = torch.arange(config.num_objects + 1, device=tokens.device) * config.num_cells
    vector = torch.zeros((*tokens.shape[:-1], config.observation_size), device=tokens.device)
    return vector.scatter_(-1, tokens + starts, 1.0)


@cache
def _symmetry_table(size: int) -> Tensor:
    cells = torch.arange(size * size).view(size, size)
    return torch.stack([torch.rot90(board, turns).flatten() for board in (cells, cells.flip(0)) for turns in range(4)])


def random_symmetry(size: int, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Apply a random symmetry of the square, one of eight, to each episode: rotations and reflections.

    tokens int64 (b, t, o + 1), cells -> the same shape. Directions and positions change, colors do not.
    """
    table = _symmetry_table(size).to(tokens.device)
    symmetry = torch.randint(len(table), (len(tokens),), generator=generator, device=tokens.device)
    return table[symmetry][:, None].expand(-1, tokens.shape[1], -1).gather(2, tokens)
