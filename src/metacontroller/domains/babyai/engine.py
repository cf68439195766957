"""All of this world that needs minigrid, so that its config can be read without."""

from __future__ import annotations

from functools import cache

import numpy as np
from minigrid.core.grid import Grid
from minigrid.core.world_object import WorldObj

from metacontroller.domains.babyai.batch import RoomBatch
from metacontroller.domains.babyai.dataset import Recipe, generate
from metacontroller.domains.babyai.level import Room
from metacontroller.domains.babyai.observation import NUM_SYMBOLS, TILE, UNSEEN, VIEW, symbols_image

__all__ = ["Recipe", "Room", "RoomBatch", "draw", "generate", "tiles"]

TILE_PIXELS = 16


@cache
def tiles() -> np.ndarray:
    """(NUM_SYMBOLS, 2, TILE, TILE, 3) uint8: how minigrid draws the cell of each symbol, without and with the agent."""

    def drawn(symbol: int, direction: int | None) -> np.ndarray:
        cell = WorldObj.decode(*symbols_image(np.array(symbol)).tolist())
        return Grid.render_tile(cell, direction, highlight=symbol != UNSEEN, tile_size=TILE).astype(np.uint8)

    return np.stack([np.stack([drawn(symbol, direction) for direction in (None, 3)]) for symbol in range(NUM_SYMBOLS)])


def draw(view: np.ndarray) -> np.ndarray:
    """A partial view in minigrid's encoding, (VIEW_CELLS, 3), as a picture (height, width, 3) uint8."""
    grid, _ = Grid.decode(view.reshape(VIEW, VIEW, 3))
    return grid.render(TILE_PIXELS, agent_pos=(VIEW // 2, VIEW - 1), agent_dir=3)
