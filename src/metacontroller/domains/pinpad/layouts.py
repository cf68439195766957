"""Layouts of the pinpad worlds: the size of a square of cells, where everything is when an episode begins, whether all
of it can be reached, and the shortest ways to colors, for all episodes at once.

Cells are numbered ``row * size + column``. Axes: b episode, o object (every color, then every wall), k target, n cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.ranges import MOST_SIDE, Steps, Whole, Width, WidthOr0, check_fields

MAX_RESAMPLES = 1000
UNREACHABLE = 16_000
"""Distance of cells from which the target cannot be reached; far above any way, far below int16's limit."""

Side = Annotated[int, Whole(2, MOST_SIDE)]


@dataclass(frozen=True, kw_only=True)
class Board:
    """Size and content of a square of cells. UserError for values that do not fit together.

    surface, walker: what a world calls the square, and who walks on it.
    """

    surface: ClassVar[str] = "board"
    walker: ClassVar[str] = "walker"

    size: Side
    """G: cells along each side."""
    num_colors: Width
    """O: colored cells, numbered from 0."""
    num_walls: WidthOr0
    """W: wall cells."""
    max_steps: Steps
    """T: steps after which an episode is truncated."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_objects + 1 > self.num_cells:
            raise UserError(
                f"a {self.surface} of size {self.size} has {self.num_cells} cells, too few for {self.num_colors} "
                f"colors, {self.num_walls} walls and the {self.walker}; raise size or take fewer colors or walls."
            )

    @property
    def num_objects(self) -> int:
        """Colors and walls together."""
        return self.num_colors + self.num_walls

    @property
    def num_cells(self) -> int:
        """Cells of the square."""
        return self.size * self.size


@dataclass
class Layouts:
    """Cells of all objects and of the agent at the start of an episode.

    Attributes:
        objects: int64 (b, o), the cell of each color and then of each wall; no two in the same cell.
        agent: int64 (b,), the start cell, never that of an object.
    """

    objects: Tensor
    agent: Tensor

    def __len__(self) -> int:
        return len(self.agent)

    def repeat(self, n: int) -> Layouts:
        """Return each layout n times in a row: a, a, b, b, …"""
        return Layouts(self.objects.repeat_interleave(n, dim=0), self.agent.repeat_interleave(n, dim=0))


def check_layouts(board: Board, layouts: Layouts) -> None:
    """UserError unless the layouts fit the board: shapes, cells within range, and no two things in one cell."""
    expected = (len(layouts.agent), board.num_objects)
    if layouts.agent.ndim != 1 or tuple(layouts.objects.shape) != expected:
        raise UserError(
            f"layouts have objects of shape {tuple(layouts.objects.shape)} and agent of shape "
            f"{tuple(layouts.agent.shape)}: expected (batch, {board.num_objects}) and (batch,)."
        )
    cells = torch.cat([layouts.objects, layouts.agent[:, None]], dim=1).sort(dim=1).values
    if ((cells < 0) | (cells >= board.num_cells)).any():
        raise UserError(f"a layout names a cell off the {board.surface}: cells run from 0 to {board.num_cells - 1}.")
    if (cells[:, 1:] == cells[:, :-1]).any():
        raise UserError(
            f"a layout has two things in one cell: give every color, wall and the {board.walker} a cell of its own."
        )


def object_lookup(board: Board, objects: Tensor) -> Tensor:
    """objects int64 (b, o), the cell of each -> int16 (b, n): the number of the object in each cell, -1 for none."""
    lookup = torch.full((len(objects), board.num_cells), -1, dtype=torch.int16, device=objects.device)
    numbers = torch.arange(board.num_objects, dtype=torch.int16, device=objects.device)
    return lookup.scatter_(1, objects, numbers.expand(len(objects), -1))


Line = tuple[int | slice, ...]


@cache
def sweeps(size: int) -> list[tuple[Line, Line]]:
    """Indices of the rows and columns of a square (size, size, ...), each with those of the one before it.

    Following them in order sweeps the square down, up, right and left.
    """
    rows: list[tuple[Line, Line]] = [((i,), (i - 1,)) for i in range(1, size)]
    rows += [((i,), (i + 1,)) for i in range(size - 2, -1, -1)]
    return rows + [((slice(None), *here), (slice(None), *neighbor)) for here, neighbor in rows]


def feasible(board: Board, layouts: Layouts) -> Tensor:
    """Return bool (b,): every color can be reached from the start, and from every other color, over empty cells only.

    The empty cells connected to the start are flooded. A color can be reached from the start exactly when it touches
    the flooded region; when all colors touch it, each can also be reached from each other.
    """
    batch, size = len(layouts), board.size
    empty = (object_lookup(board, layouts.objects) < 0).T.reshape(size, size, batch)
    flooded = torch.zeros_like(empty).view(-1, batch).scatter_(0, layouts.agent[None], True).view(size, size, batch)
    before = torch.zeros_like(flooded)
    while not torch.equal(before, flooded):
        before.copy_(flooded)
        for here, neighbor in sweeps(size):
            flooded[here] |= flooded[neighbor] & empty[here]
    touched = flooded.clone()
    for here, neighbor in sweeps(size):
        touched[here] |= flooded[neighbor]
    return touched.view(-1, batch).gather(0, layouts.objects[:, : board.num_colors].T).all(dim=0)


def sample_layouts(
    board: Board, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Layouts:
    """Sample n layouts uniformly from the feasible ones, see `feasible`; on the generator's device unless one is given.

    Infeasible layouts are sampled again: our choice, the paper does not mention them. UserError if no feasible layout
    is found, as on a board that is nearly full.
    """
    if device is None:
        device = "cpu" if generator is None else generator.device

    def draw(count: int) -> Tensor:
        keys = torch.rand((count, board.num_cells), generator=generator, device=device)
        return keys.topk(board.num_objects + 1, dim=1).indices

    cells, bad = draw(n), torch.arange(n, device=device)
    for _ in range(MAX_RESAMPLES + 1):
        bad = bad[~feasible(board, Layouts(cells[bad, :-1], cells[bad, -1]))]
        if not len(bad):
            return Layouts(cells[:, :-1].contiguous(), cells[:, -1].contiguous())
        cells[bad] = draw(len(bad))
    raise UserError(
        f"no feasible layout was found in {MAX_RESAMPLES} tries for size {board.size}, {board.num_colors} colors and "
        f"{board.num_walls} walls; raise size or take fewer colors or walls."
    )


def _nearest_neighbor(distance: Tensor) -> Tensor:
    """Smallest distance among the four neighbors of each cell, for (size, size, rows)."""
    padded = F.pad(distance, (0, 0, 1, 1, 1, 1), value=UNREACHABLE)
    vertical = torch.minimum(padded[:-2, 1:-1], padded[2:, 1:-1])
    horizontal = torch.minimum(padded[1:-1, :-2], padded[1:-1, 2:])
    return torch.minimum(vertical, horizontal)


def entering_fields(board: Board, objects: Tensor, targets: Tensor) -> Tensor:
    """Return int16 (size, size, b k): steps of the shortest way from each cell to each target color.

    objects int64 (b, o): cells of colors and walls. targets int64 (b, k): colors. A way enters no wall and no other
    color, and does not start on one either; `UNREACHABLE` where there is none. Exact: relaxation runs until nothing
    changes. It sweeps over the boards row by row and column by column in both directions, so that distances propagate
    through a whole board in one sweep; all boards and targets are contiguous in memory.
    """
    lookup = object_lookup(board, objects).T.contiguous()[:, :, None]  # (n, b, 1)
    target = lookup == targets
    shape = (board.size, board.size, targets.numel())
    penalty = ((lookup >= 0) & ~target).to(torch.int16).mul_(UNREACHABLE).view(shape)
    distance = torch.where(target, 0, UNREACHABLE).to(torch.int16).view(shape)
    before = torch.empty_like(distance)
    while not torch.equal(before, distance):
        before.copy_(distance)
        for here, neighbor in sweeps(board.size):
            step = (distance[neighbor] + 1).maximum(penalty[here])
            torch.minimum(distance[here], step, out=distance[here])
    return distance


def distance_fields(board: Board, objects: Tensor, targets: Tensor) -> Tensor:
    """Return int16 (b, k, n): steps of the shortest way from each cell to each target color, walls and others avoided.

    objects int64 (b, o), targets int64 (b, k): as of `entering_fields`. A way may start on another color, as it does
    after that color was visited, but never enters one. Walls and cells without a way have a distance of at least
    `UNREACHABLE`.
    """
    distance = entering_fields(board, objects, targets)
    # No way may enter another color, but one may start there.
    departing = torch.minimum(distance, _nearest_neighbor(distance) + 1).view(-1, *targets.shape)
    walls = object_lookup(board, objects).T[:, :, None] >= board.num_colors
    return departing.masked_fill_(walls, UNREACHABLE).permute(1, 2, 0).contiguous()
