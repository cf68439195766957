"""Pictures of a grid, with numpy only."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig
from metacontroller.errors import UserError

EMPTY = (245, 245, 242)
WALL = (70, 72, 78)
LINE = (205, 205, 200)
AGENT = (20, 20, 24)
AGENT_RIM = (255, 255, 255)

PALETTE = (
    (31, 119, 190),
    (245, 133, 24),
    (52, 160, 72),
    (214, 48, 49),
    (142, 84, 190),
    (146, 96, 74),
    (233, 108, 190),
    (238, 202, 59),
)
"""RGB of colors 0 to 7; colors beyond are spread around the hue circle."""


def color_rgb(color: int) -> tuple[int, int, int]:
    """Return the RGB, 0..255, in which a color is shown."""
    if color < len(PALETTE):
        return PALETTE[color]
    golden_turn = 0.618033988749895
    red, green, blue = colorsys.hsv_to_rgb(color * golden_turn % 1.0, 0.55, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


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
        raise UserError(f"cell_pixels is {cell_pixels}: a cell needs at least 4 pixels a side.")
    if len(objects) != config.num_objects:
        raise UserError(f"{len(objects)} objects were given: expected {config.num_objects}, the colors then the walls.")
    cells = np.full((config.num_cells, cell_pixels, cell_pixels, 3), EMPTY, dtype=np.uint8)
    for number, cell in enumerate(objects):
        cells[int(cell)] = color_rgb(number) if number < config.num_colors else WALL
    cells[:, 0, :] = LINE
    cells[:, :, 0] = LINE
    _draw_agent(cells[int(agent)])
    rows = cells.reshape(config.size, config.size, cell_pixels, cell_pixels, 3)
    side = config.size * cell_pixels
    return rows.swapaxes(1, 2).reshape(side, side, 3)


def _draw_agent(cell: np.ndarray) -> None:
    """Draw a rimmed disc in the middle of one cell, in place."""
    pixels = len(cell)
    offset = np.arange(pixels) - (pixels - 1) / 2
    radius = np.hypot(offset[:, None], offset[None, :]) / pixels
    cell[radius < 0.34] = AGENT_RIM
    cell[radius < 0.27] = AGENT
