"""All of this world that needs minigrid, so that its config can be read without."""

from __future__ import annotations

import numpy as np
from minigrid.core.grid import Grid

from metacontroller.domains.babyai.batch import RoomBatch
from metacontroller.domains.babyai.dataset import Recipe, generate, open_dataset
from metacontroller.domains.babyai.level import Room
from metacontroller.domains.babyai.observation import VIEW

__all__ = ["Recipe", "Room", "RoomBatch", "draw", "generate", "open_dataset"]

TILE_PIXELS = 16


def draw(view: np.ndarray) -> np.ndarray:
    """A partial view in minigrid's encoding, (VIEW_CELLS, 3), as a picture (height, width, 3) uint8."""
    grid, _ = Grid.decode(view.reshape(VIEW, VIEW, 3))
    return grid.render(TILE_PIXELS, agent_pos=(VIEW // 2, VIEW - 1), agent_dir=3)
