"""Grids as data: their size, where everything is when an episode begins, and what of it can be reached.

Cells are numbered ``row * size + column``. Axes: b grid of the batch, o object (every color, then every wall), n cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from metacontroller.errors import UserError
from metacontroller.ranges import MOST_SIDE, MOST_STEPS, MOST_WIDTH, WIDTH, Whole, check_fields

MAX_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class PinpadConfig:
    """Size and content of a grid; the defaults are the paper's. UserError for values that do not fit together."""

    size: int = 7
    """G, cells along each side."""
    num_colors: int = 8
    """O, colored cells, numbered from 0."""
    num_walls: int = 4
    """W, wall cells."""
    max_steps: int = 100
    """T, steps after which an episode is truncated."""

    def __post_init__(self) -> None:
        check_fields(self, size=Whole(2, MOST_SIDE), num_colors=WIDTH, num_walls=Whole(0, MOST_WIDTH))
        check_fields(self, max_steps=Whole(most=MOST_STEPS))
        if self.num_objects + 1 > self.num_cells:
            raise UserError(
                f"a grid of size {self.size} has {self.num_cells} cells, too few for {self.num_colors} colors, "
                f"{self.num_walls} walls and the agent: raise size or take fewer colors or walls."
            )

    @property
    def num_objects(self) -> int:
        """Colors and walls together."""
        return self.num_colors + self.num_walls

    @property
    def num_cells(self) -> int:
        """Cells of the grid."""
        return self.size * self.size

    @property
    def observation_size(self) -> int:
        """Length of the paper's observation vector, size² (walls + colors + 1)."""
        return self.num_cells * (self.num_objects + 1)


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

    def index(self, rows: Tensor) -> Layouts:
        """Return the layouts of the given rows (indices or a boolean mask)."""
        return Layouts(self.objects[rows], self.agent[rows])

    def repeat(self, n: int) -> Layouts:
        """Return each layout n times in a row: a, a, b, b, …"""
        return Layouts(self.objects.repeat_interleave(n, dim=0), self.agent.repeat_interleave(n, dim=0))

    def to(self, device: torch.device | str) -> Layouts:
        """Return the same layouts on another device."""
        return Layouts(self.objects.to(device), self.agent.to(device))


def check_layouts(config: PinpadConfig, layouts: Layouts) -> None:
    """UserError unless the layouts fit the grid: shapes, cells within range, and no two things in one cell."""
    expected = (len(layouts.agent), config.num_objects)
    if layouts.agent.ndim != 1 or tuple(layouts.objects.shape) != expected:
        raise UserError(
            f"layouts have objects of shape {tuple(layouts.objects.shape)} and agent of shape "
            f"{tuple(layouts.agent.shape)}: expected (batch, {config.num_objects}) and (batch,)."
        )
    cells = torch.cat([layouts.objects, layouts.agent[:, None]], dim=1).sort(dim=1).values
    if ((cells < 0) | (cells >= config.num_cells)).any():
        raise UserError(f"a layout names a cell off the grid: cells run from 0 to {config.num_cells - 1}.")
    if (cells[:, 1:] == cells[:, :-1]).any():
        raise UserError("a layout has two things in one cell: give every color, wall and the agent a cell of its own.")


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


def object_lookup(config: PinpadConfig, layouts: Layouts) -> Tensor:
    """Return int16 (b, n): the number of the object in each cell (colors first, then walls), -1 where there is none."""
    lookup = torch.full((len(layouts), config.num_cells), -1, dtype=torch.int16, device=layouts.agent.device)
    indices = torch.arange(config.num_objects, dtype=torch.int16, device=lookup.device)
    return lookup.scatter_(1, layouts.objects, indices.expand(len(layouts), -1))


Line = tuple[int | slice, ...]


@cache
def sweeps(size: int) -> list[tuple[Line, Line]]:
    """Indices of the rows and columns of a grid (size, size, ...), each with those of the one before it.

    Following them in order sweeps the grid down, up, right and left.
    """
    everything = slice(None)
    rows: list[tuple[Line, Line]] = [((i,), (i - 1,)) for i in range(1, size)]
    rows += [((i,), (i + 1,)) for i in range(size - 2, -1, -1)]
    return rows + [((everything, *here), (everything, *neighbor)) for here, neighbor in rows]


def feasible(config: PinpadConfig, layouts: Layouts) -> Tensor:
    """Return bool (b,): every color can be reached from the start, and from every other color, over empty cells only.

    The empty cells connected to the start are flooded. A color can be reached from the start exactly when it touches
    the flooded region; when all colors touch it, each can also be reached from each other.
    """
    batch, size = len(layouts), config.size
    empty = (object_lookup(config, layouts) < 0).T.reshape(size, size, batch)
    flooded = torch.zeros_like(empty).view(-1, batch).scatter_(0, layouts.agent[None], True).view(size, size, batch)
    before = torch.zeros_like(flooded)
    while not torch.equal(before, flooded):
        before.copy_(flooded)
        for here, neighbor in sweeps(size):
            flooded[here] |= flooded[neighbor] & empty[here]
    touched = flooded.clone()
    for here, neighbor in sweeps(size):
        touched[here] |= flooded[neighbor]
    return touched.view(-1, batch).gather(0, layouts.objects[:, : config.num_colors].T).all(dim=0)


def sample_layouts(
    config: PinpadConfig, n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Layouts:
    """Sample n layouts uniformly from the feasible ones, see `feasible`.

    Infeasible layouts are sampled again: our choice, the paper does not mention them. UserError if no feasible layout
    is found, as on a grid that is nearly full.
    """
    layouts = _sample_any_layouts(config, n, generator, device)
    bad = (~feasible(config, layouts)).nonzero().squeeze(1)
    for _ in range(MAX_RESAMPLES):
        if len(bad) == 0:
            return layouts
        again = _sample_any_layouts(config, len(bad), generator, device)
        layouts.objects[bad], layouts.agent[bad] = again.objects, again.agent
        bad = bad[~feasible(config, again)]
    raise UserError(
        f"no feasible layout was found in {MAX_RESAMPLES} tries for size {config.size}, {config.num_colors} colors and "
        f"{config.num_walls} walls: raise size or take fewer colors or walls."
    )


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


def _sample_any_layouts(
    config: PinpadConfig, n: int, generator: torch.Generator | None, device: torch.device | str
) -> Layouts:
    keys = torch.rand((n, config.num_cells), generator=generator, device=device)
    cells = keys.topk(config.num_objects + 1, dim=1).indices
    return Layouts(cells[:, :-1].contiguous(), cells[:, -1].contiguous())
