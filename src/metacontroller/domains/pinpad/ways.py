"""Shortest ways of the pinpad worlds, from every cell to colors, for all episodes at once.

Axes: b episode, k target, n cell.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.domains.pinpad.layouts import Board, object_lookup, sweeps

UNREACHABLE = 16_000
"""Distance of cells from which the target cannot be reached; far above any way, far below int16's limit."""


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
