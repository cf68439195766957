from __future__ import annotations

import numpy as np
import pytest

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig
from metacontroller.domains.gridworld_pinpad.rendering import AGENT, EMPTY, WALL, render_rgb
from metacontroller.domains.pinpad.palette import color_rgb

CONFIG = PinpadConfig(size=3, num_colors=2, num_walls=1)


def pixel(frame, cell, inset):
    """The color near the corner of a cell (inset 3) or in its middle (inset 16), 32 pixels a cell."""
    row, column = divmod(cell, 3)
    return tuple(frame[row * 32 + inset, column * 32 + inset].tolist())


def test_everything_is_where_it_belongs():
    frame = render_rgb(CONFIG, [5, 0, 7], 4)
    assert frame.shape == (96, 96, 3)
    assert frame.dtype == np.uint8
    shown = {5: color_rgb(0), 0: color_rgb(1), 7: WALL}
    for cell in range(9):
        assert pixel(frame, cell, 3) == shown.get(cell, EMPTY)
    assert pixel(frame, 4, 16) == AGENT
    assert all(pixel(frame, cell, 16) != AGENT for cell in range(9) if cell != 4)


def test_the_color_under_the_agent_stays_visible():
    frame = render_rgb(CONFIG, [5, 0, 7], 5)
    assert pixel(frame, 5, 3) == color_rgb(0)
    assert pixel(frame, 5, 16) == AGENT


def test_colors_are_distinct():
    assert len({color_rgb(color) for color in range(24)}) == 24


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="cell_pixels is 2"):
        render_rgb(CONFIG, [5, 0, 7], 4, cell_pixels=2)
    with pytest.raises(ValueError, match="2 objects were given; expected 3"):
        render_rgb(CONFIG, [5, 0], 4)
