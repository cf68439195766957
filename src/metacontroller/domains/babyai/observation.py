"""What a model reads of a BabyAI room: symbols of the partial view, the agent's direction, the words of the mission.

Axes: b rows, w width and height of the room. One observation is `VIEW_CELLS` symbols, the direction, and a word for
each place of the mission; or the view as a picture, then the same. A symbol stands for one (type, color) of minigrid's
encoding; what lies in one room has no other state, so that nothing of the 7 x 7 x 3 view is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metacontroller.errors import UserError

VIEW = 7
"""Cells along each side of the partial view; the agent stands in the middle of its last row and looks up."""
VIEW_CELLS = VIEW * VIEW
AGENT_CELL = (VIEW // 2) * VIEW + VIEW - 1
"""Where the agent stands in the view; the symbol there is what it carries."""

TILE = 8
"""Pixels along each side of a cell in pictures, as of minigrid's own."""
PICTURE = (VIEW * TILE, VIEW * TILE, 3)
"""Height, width and channels of a view as a picture."""
PIXELS = math.prod(PICTURE)

UNSEEN, EMPTY, WALL = 0, 1, 2
KINDS = ("key", "ball", "box")
COLORS = ("red", "green", "blue", "purple", "yellow", "grey")
NUM_SYMBOLS = 3 + len(KINDS) * len(COLORS)
FIRST_KIND = 5  # minigrid's number of the first of KINDS

WORDS = (
    *("go", "to", "the", "a", "open", "pick", "up", "put", "next", "object", "box", "ball", "key", "door"),
    *("red", "green", "blue", "purple", "yellow", "grey", "then", "after", "you", "and"),
    *("on", "your", "left", "right", "in", "front", "of", "behind"),
)
"""The words of BabyAI's missions; 0 stands for none, 1 for the first of them."""

HEADINGS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
"""Minigrid's four directions as steps (x, y): right, down, left, up."""


def _view_offsets() -> np.ndarray:
    """(4, VIEW_CELLS, 2): by direction, where each cell of the view lies relative to the agent; columns first."""
    column, row = np.meshgrid(np.arange(VIEW), np.arange(VIEW), indexing="ij")
    ahead, right = (VIEW - 1 - row).ravel()[:, None], (column - VIEW // 2).ravel()[:, None]
    return np.stack([ahead * step + right * np.array((-step[1], step[0])) for step in HEADINGS])


VIEW_OFFSETS = _view_offsets()


def object_symbol(kind: str, color: str) -> int:
    """The symbol of an object."""
    return 3 + KINDS.index(kind) * len(COLORS) + COLORS.index(color)


def image_symbols(image: np.ndarray) -> np.ndarray:
    """Minigrid's encoding (..., 3) of cells -> their symbols (...), int64; UserError for types of other levels."""
    kind, color = image[..., 0].astype(np.int64), image[..., 1].astype(np.int64)
    if ((kind > WALL) & ((kind < FIRST_KIND) | (kind >= FIRST_KIND + len(KINDS)))).any():
        raise UserError("the view shows a door, goal or lava; this world has one room with keys, balls and boxes only.")
    return np.where(kind <= WALL, kind, 3 + (kind - FIRST_KIND) * len(COLORS) + color)


def symbols_image(symbols: np.ndarray) -> np.ndarray:
    """The inverse of `image_symbols`: symbols (...) -> minigrid's encoding (..., 3), uint8."""
    is_object, kind, color = symbols >= 3, (symbols - 3) // len(COLORS), (symbols - 3) % len(COLORS)
    grey_wall = np.where(symbols == WALL, COLORS.index("grey"), 0)
    parts = np.where(is_object, FIRST_KIND + kind, symbols), np.where(is_object, color, grey_wall)
    return np.stack([*parts, np.zeros_like(symbols)], -1).astype(np.uint8)


def view_symbols(cells: np.ndarray, places: np.ndarray, directions: np.ndarray, carried: np.ndarray) -> np.ndarray:
    """The partial views of b agents, (b, VIEW_CELLS).

    cells (b, w, w): symbols by x and y. places (b, 2), directions (b,): of the agents. carried (b,): symbols of what
    they carry, `EMPTY` for nothing. A room has no walls inside and objects hide nothing, so an agent sees every cell of
    its room that the view reaches.
    """
    width = cells.shape[1]
    seen = places[:, None] + VIEW_OFFSETS[directions]
    x, y = seen[..., 0], seen[..., 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < width)
    rows = np.arange(len(cells))[:, None]
    view = np.where(inside, cells[rows, x.clip(0, width - 1), y.clip(0, width - 1)], UNSEEN)
    view[:, AGENT_CELL] = carried
    return view


def mission_words(mission: str, length: int) -> np.ndarray:
    """The numbers of a mission's words, (length,), 0 after the last; UserError for unknown words or too many."""
    words = re.findall("[a-z]+", mission.lower())
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise UserError(f"mission {mission!r} has the unknown word {unknown[0]!r}; known are {', '.join(WORDS)}.")
    if len(words) > length:
        raise UserError(f"mission {mission!r} has {len(words)} words; the model reads {length}.")
    return np.array([1 + WORDS.index(word) for word in words] + [0] * (length - len(words)), dtype=np.int64)


def encoder_options(mission_length: int, *, rgb: bool = False) -> dict[str, Any]:
    """Options of the model's encoder: the observation, of which the mission is the condition."""
    condition = [len(WORDS) + 1] * mission_length
    if rgb:
        return {"picture": {"image": list(PICTURE), "sizes": [len(HEADINGS)], "condition": condition}}
    return {"tokens": {"sizes": [NUM_SYMBOLS] * VIEW_CELLS + [len(HEADINGS)], "condition": condition}}


def pictures(view: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Views (..., VIEW_CELLS) as minigrid draws them, (..., *PICTURE) uint8. tiles: as of `engine.tiles`."""
    with_agent = np.arange(VIEW_CELLS) == AGENT_CELL
    drawn = tiles[view, with_agent.astype(int)].reshape(*view.shape[:-1], VIEW, VIEW, TILE, TILE, 3)
    # columns, rows, and both within a tile -> rows with those of tiles, columns likewise
    return np.moveaxis(drawn, (-4, -3, -5), (-5, -4, -3)).reshape(*view.shape[:-1], *PICTURE)


def with_pictures(observations: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Observations of symbols (..., VIEW_CELLS + 1 + words) with pictures in their place, (..., pixels + 1 + words)
    uint8."""
    drawn = pictures(observations[..., :VIEW_CELLS], tiles)
    flat = drawn.reshape(*drawn.shape[:-3], PIXELS)
    return np.concatenate([flat, observations[..., VIEW_CELLS:].astype(np.uint8)], -1)


def random_symmetry(states: Tensor, generator: torch.Generator, *, rgb: bool = False) -> Tensor:
    """states (b, t, observation) under one of the eight symmetries of the square per row.

    The view is the agent's own: turning the room changes only the direction, reflecting it mirrors the view too. In
    pictures cells change their places; what is drawn in them does not.
    """
    count, device = len(states), states.device
    symmetry = torch.randint(8, (count,), generator=generator, device=device)
    turn, mirrored = symmetry % 4, symmetry >= 4
    cells, shape = (PIXELS, (PICTURE[0], VIEW, TILE * 3)) if rgb else (VIEW_CELLS, (VIEW, VIEW))
    view = states[..., :cells].unflatten(-1, shape)  # columns are the last axis but one
    view = torch.where(mirrored.view(-1, *[1] * (view.dim() - 1)), view.flip(-2), view).flatten(2)
    direction = states[..., cells]
    direction = (torch.where(mirrored[:, None], -direction, direction) + turn[:, None]) % 4
    return torch.cat([view, direction[..., None].to(states.dtype), states[..., cells + 1 :]], -1)


def names_of(objects: Sequence[str]) -> list[tuple[str, str]]:
    """Each object "red ball" as its kind and color; UserError for anything else."""
    pairs = []
    for name in objects:
        color, _, kind = name.partition(" ")
        if kind not in KINDS or color not in COLORS:
            raise UserError(
                f"object {name!r} is unknown; write a color ({', '.join(COLORS)}) and a kind ({', '.join(KINDS)}), "
                "such as 'red ball'."
            )
        pairs.append((kind, color))
    return pairs
