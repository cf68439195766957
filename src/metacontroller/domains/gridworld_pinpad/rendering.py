"""Pictures of a grid, with numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig
from metacontroller.domains.pinpad.palette import color_rgb
from metacontroller.errors import UserError

EMPTY = (245, 245, 242)
WALL = (70, 72, 78)
LINE = (205, 205, 200)
AGENT = (20, 20, 24)
AGENT_RIM = (255, 255, 255)


def render_rgb(config: PinpadConfig, objects: Sequence[int], agent: int, cell_pixels: int = 32) -> np.ndarray:
    """Draw one grid as uint8 (size * cell_pixels, size * cell_pixels, 3).

    Args:
        config: the grid's configuration.
        objects: cell of each color, then of each wall.
        agent: the agent's cell; drawn as a disc, so that the color under it stays visible.
        cell_pixels: side of a cell in pixels, at least 4.

    UserError for a smaller cell or a wrong number of objects.
    """
    if cell_pixels < 4:
        raise UserError(f"cell_pixels is {cell_pixels}; a cell needs at least 4 pixels a side.")
    if len(objects) != config.num_objects:
        raise UserError(f"{len(objects)} objects were given; expected {config.num_objects}, the colors then the walls.")
    cells = np.full((config.num_cells, cell_pixels, cell_pixels, 3), EMPTY, dtype=np.uint8)
    for number, cell in enumerate(objects):
        cells[int(cell)] = color_rgb(number) if number < config.num_colors else WALL
    cells[:, 0, :] = LINE
    cells[:, :, 0] = LINE
    offset = (np.arange(cell_pixels) - (cell_pixels - 1) / 2) / cell_pixels
    radius = np.hypot(offset[:, None], offset[None, :])
    cells[int(agent)][radius < 0.34] = AGENT_RIM
    cells[int(agent)][radius < 0.27] = AGENT
    rows = cells.reshape(config.size, config.size, cell_pixels, cell_pixels, 3)
    side = config.size * cell_pixels
    return rows.swapaxes(1, 2).reshape(side, side, 3)
