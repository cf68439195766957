"""The plane of cells: its size, its places in meters, and the directions of the shortest ways over it.

Cells are numbered ``row * size + column``; row 0 is the one with the largest y, column 0 the one with the smallest x,
and the middle of the plane is the origin. Axes: b episode, o object (every color, then every wall), c color, n cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

import torch
from torch import Tensor

from metacontroller.domains.pinpad.layouts import UNREACHABLE, Board, Side, entering_fields, object_lookup
from metacontroller.ranges import Number, Steps, Width, WidthOr0

UP, DOWN, LEFT, RIGHT = range(4)
"""Directions of the shortest ways, numbered as the grid world numbers its moves."""
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""(rows, columns) of each direction."""
COUNTERCLOCKWISE = (LEFT, RIGHT, DOWN, UP)
"""The next direction counter-clockwise of each."""

Camera = Literal["above", "follow"]
"""From where pictures are taken: of the whole plane, or of the ant."""


@dataclass(frozen=True, kw_only=True)
class Arena(Board):
    """Size and content of the plane; the defaults are the paper's where it gives them. UserError for values that do
    not fit together."""

    surface, walker = "plane", "ant"

    size: Side = 4
    num_colors: Width = 4
    num_walls: WidthOr0 = 1
    max_steps: Steps = 500
    cell_size: Annotated[float, Number(0, above=True, noun="number of meters")] = 1.5
    """Side of a cell in meters (our choice; the paper is silent)."""
    start_yaw: Annotated[float, Number(0, math.pi)] = math.pi
    """The largest yaw at the start to either side, in radians; pi is any, the paper's. The ant's four legs are alike:
    with pi / 4 it starts as with any yaw, but for which leg is called the first."""

    @property
    def half(self) -> float:
        """Half of the plane's side in meters."""
        return self.size * self.cell_size / 2

    def center(self, cells: Tensor) -> Tensor:
        """x, y of the middle of cells (...), in meters: (..., 2) float64."""
        row, column = cells // self.size, cells % self.size
        side = torch.stack([column, self.size - 1 - row], -1).double()
        return (side + 0.5) * self.cell_size - self.half

    def cell(self, place: Tensor) -> Tensor:
        """The cell in which places (..., 2) in meters lie, int64 (...); -1 beyond the plane."""
        side = torch.floor((place + self.half) / self.cell_size).long()
        inside = ((side >= 0) & (side < self.size)).all(-1)
        row, column = self.size - 1 - side[..., 1], side[..., 0]
        return torch.where(inside, row * self.size + column, -1)


def direction_fields(arena: Arena, objects: Tensor) -> Tensor:
    """int64 (b, c, n): the direction in which the shortest way from each cell to each color begins; -1 in that color's
    cell, in walls, and where there is no way.

    Among equals it is the last counter-clockwise, so that the ways of a turned world are the turned ways; of two
    opposite ones it is the first of up, down, left and right. A way enters no wall and no other color, but may start on
    one, as it does once that color was visited.
    """
    colors = torch.arange(arena.num_colors, device=objects.device).expand(len(objects), -1)
    entering = entering_fields(arena, objects, colors).view(arena.num_cells, *colors.shape).permute(1, 2, 0)
    beside = _neighbors(arena, entering)
    nearest = beside.amin(-1)
    shortest = beside == nearest[..., None]
    last = shortest & ~shortest[..., list(COUNTERCLOCKWISE)]
    order = torch.arange(len(STEPS), 0, -1, device=objects.device)
    direction = (order + len(STEPS) * (shortest.long() + last.long())).argmax(-1)
    walls = object_lookup(arena, objects)[:, None] >= arena.num_colors
    return direction.masked_fill(walls | (entering == 0) | (nearest >= UNREACHABLE), -1)


def _neighbors(arena: Arena, field: Tensor) -> Tensor:
    """Values (..., n) of cells -> (..., n, 4) of the cells up, down, left and right of them; `UNREACHABLE` beyond."""
    beyond = torch.full_like(field[..., :1], UNREACHABLE)
    table = torch.tensor(_neighbor_table(arena.size), device=field.device)
    return torch.cat([field, beyond], -1)[..., table]


@cache
def _neighbor_table(size: int) -> tuple[tuple[int, ...], ...]:
    """The four neighbors of each cell; ``size * size`` beyond the plane."""
    places = [divmod(cell, size) for cell in range(size * size)]
    return tuple(
        tuple(
            (row + down) * size + column + right if 0 <= row + down < size and 0 <= column + right < size else size**2
            for down, right in STEPS
        )
        for row, column in places
    )
