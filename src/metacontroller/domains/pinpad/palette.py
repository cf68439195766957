"""The colors of the pinpad worlds as pictures show them."""

from __future__ import annotations

import colorsys

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
    """RGB, 0..255, of a color."""
    if color < len(PALETTE):
        return PALETTE[color]
    golden_turn = 0.618033988749895
    red, green, blue = colorsys.hsv_to_rgb(color * golden_turn % 1.0, 0.55, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)
