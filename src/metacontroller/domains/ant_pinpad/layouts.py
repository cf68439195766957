"""The plane of cells: its size, where everything is when an episode begins, and the shortest ways over it.

Cells are numbered ``row * size + column``; row 0 is the one with the largest y, column 0 the one with the smallest x,
and the middle of the plane is the origin. Axes: b episode, o object (every color, then every wall), c color, n cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from metacontroller.errors import UserError
from metacontroller.ranges import MOST_SIDE, MOST_STEPS, MOST_WIDTH, WIDTH, Number, Whole, check_fields

MAX_RESAMPLES = 1000
FAR = 10_000
"""Distance of cells from which there is no way."""
UP, DOWN, LEFT, RIGHT = range(4)
"""Directions of the shortest ways, numbered as the grid world numbers its moves."""
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""(rows, columns) of each direction."""

Camera = Literal["above", "follow"]
"""From where pictures are taken: of the whole plane, or of the ant."""
CAMERAS: tuple[str, ...] = get_args(Camera)


@dataclass(frozen=True, kw_only=True)
class Arena:
    """Size and content of the plane; the defaults are the paper's where it gives them. UserError for values that do
    not fit together."""

    size: int = 4
    """G, cells along each side."""
    num_colors: int = 4
    """O, colored cells, numbered from 0."""
    num_walls: int = 1
    """W, wall cells."""
    max_steps: int = 500
    """T, steps after which an episode is truncated."""
    cell_size: float = 2.0
    """Side of a cell in meters (our choice; the paper gives none)."""

    def __post_init__(self) -> None:
        check_fields(self, size=Whole(2, MOST_SIDE), num_colors=WIDTH, num_walls=Whole(0, MOST_WIDTH))
        check_fields(self, max_steps=Whole(most=MOST_STEPS), cell_size=Number(0, above=True, noun="number of meters"))
        if self.num_objects + 1 > self.num_cells:
            raise UserError(
                f"a plane of size {self.size} has {self.num_cells} cells, too few for {self.num_colors} colors, "
                f"{self.num_walls} walls and the ant; raise size or take fewer colors or walls."
            )

    @property
    def num_objects(self) -> int:
        """Colors and walls together."""
        return self.num_colors + self.num_walls

    @property
    def num_cells(self) -> int:
        """Cells of the plane."""
        return self.size * self.size

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


@dataclass
class Layouts:
    """Cells of all objects, and of the ant at the start of an episode.

    objects: int64 (b, o), the cell of each color and then of each wall; no two in the same cell.
    start: int64 (b,), never that of an object.
    """

    objects: Tensor
    start: Tensor


def sample_layouts(arena: Arena, n: int, generator: torch.Generator) -> Layouts:
    """n layouts, uniform among those in which the start and all colors can be reached from each other over empty cells.

    Others are sampled again (our choice; the paper does not mention them). UserError if hardly any layout is such.
    """
    device = generator.device
    objects = torch.empty((n, arena.num_objects), dtype=torch.int64, device=device)
    start = torch.empty(n, dtype=torch.int64, device=device)
    missing = torch.arange(n, device=device)
    for _ in range(MAX_RESAMPLES):
        keys = torch.rand((len(missing), arena.num_cells), generator=generator, device=device)
        cells = keys.topk(arena.num_objects + 1, dim=1).indices
        objects[missing], start[missing] = cells[:, :-1], cells[:, -1]
        missing = missing[~_feasible(arena, Layouts(objects[missing], start[missing]))]
        if not len(missing):
            return Layouts(objects, start)
    raise UserError(
        f"no layout with a way to every color was found in {MAX_RESAMPLES} tries for size {arena.size}, "
        f"{arena.num_colors} colors and {arena.num_walls} walls; raise size or take fewer colors or walls."
    )


def object_lookup(arena: Arena, objects: Tensor) -> Tensor:
    """int64 (b, n): the number of the object in each cell (colors first, then walls), -1 where there is none."""
    lookup = torch.full((len(objects), arena.num_cells), -1, device=objects.device)
    numbers = torch.arange(arena.num_objects, device=objects.device)
    return lookup.scatter_(1, objects, numbers.expand(len(objects), -1))


def distance_fields(arena: Arena, objects: Tensor) -> Tensor:
    """int64 (b, c, n): cells of the shortest way from each cell to each color that enters no wall and no other color.

    A way may start on another color, as it does once that color was visited. `FAR` where there is none, and in walls.
    """
    entering, walls = _entering(arena, objects)
    departing = torch.minimum(entering, _neighbors(arena, entering).amin(-1) + 1)
    return departing.masked_fill(walls, FAR).clamp(max=FAR)


def direction_fields(arena: Arena, objects: Tensor) -> Tensor:
    """int64 (b, c, n): the direction in which the shortest way from each cell to each color begins, the first of up,
    down, left and right among equals; -1 in that color's cell, in walls, and where there is no way."""
    entering, walls = _entering(arena, objects)
    nearest, direction = _neighbors(arena, entering).min(-1)
    none = walls | (entering == 0) | (nearest >= FAR)
    return direction.masked_fill(none, -1)


def _entering(arena: Arena, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (b, c, n) for ways that also start on no other object, and which cells are walls (b, 1, n)."""
    lookup = object_lookup(arena, objects)[:, None]
    color = torch.arange(arena.num_colors, device=objects.device)[None, :, None]
    target = lookup == color
    barred = (lookup >= 0) & ~target
    distance = torch.where(target, 0, FAR)
    while True:
        nearer = torch.minimum(distance, _neighbors(arena, distance).amin(-1) + 1).masked_fill(barred, FAR)
        if torch.equal(nearer, distance):
            return distance, lookup >= arena.num_colors
        distance = nearer


def _neighbors(arena: Arena, field: Tensor) -> Tensor:
    """Values (..., n) of cells -> (..., n, 4) of the cells up, down, left and right of them; `FAR` beyond the plane."""
    beyond = torch.full_like(field[..., :1], FAR)
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


def _feasible(arena: Arena, layouts: Layouts) -> Tensor:
    """(b,) bool: every color can be reached from the start, and from every other color."""
    distance = distance_fields(arena, layouts.objects)
    origins = torch.cat([layouts.objects[:, : arena.num_colors], layouts.start[:, None]], 1)
    origins = origins[:, None].expand(-1, arena.num_colors, -1)
    return (distance.gather(2, origins) < FAR).flatten(1).all(1)
