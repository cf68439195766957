"""Pictures of the ant on its cells, by MuJoCo's own renderer: from above, or by a camera that follows the ant.

Cells and walls are drawn into the scene and are no part of the model. Needs OpenGL: MUJOCO_GL chooses how; unless it
is set, EGL and OSMesa are tried on Linux without a display.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metacontroller.domains.ant_pinpad.engine import ant_model, mujoco
from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.observation import NUM_POSITIONS
from metacontroller.domains.pinpad.palette import color_rgb
from metacontroller.errors import UserError, last_line

FLOOR, WALL, LINE = (237, 237, 232), (69, 71, 79), (184, 184, 178)
BRIGHTNESS = 0.62 / 255
"""Of the colors in the scene: its lights are bright."""
GAP = 0.02
"""Between two cells, as a share of their side."""
LINE_HEIGHT, TILE_HEIGHT, WALL_HEIGHT = 0.005, 0.01, 0.4
"""In meters; tiles lie on the floor, and a wall is only drawn: the ant can walk into it, which ends the episode."""


class Painter:
    """Draws states of one plane. UserError without OpenGL."""

    def __init__(self, arena: Arena, pixels: int = 224) -> None:
        self.arena, self.pixels = arena, pixels
        self.context, self.surface = _canvas(pixels)
        self.model = ant_model()
        self.data = mujoco.MjData(self.model)
        self.scene = mujoco.MjvScene(self.model, 200 + arena.num_cells)
        self.options = mujoco.MjvOption()
        self.view = mujoco.MjrRect(0, 0, pixels, pixels)
        mujoco.mjr_resizeOffscreen(pixels, pixels, self.surface)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.surface)

    def draw(self, state: Tensor, objects: Tensor, camera: str = "above") -> np.ndarray:
        """state (29,), objects (o,) cells -> uint8 (pixels, pixels, 3)."""
        self.context.make_current()
        self.data.qpos[:] = state[:NUM_POSITIONS].cpu().numpy()
        mujoco.mj_forward(self.model, self.data)
        seen = _camera(self.arena, camera)
        parts = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self.model, self.data, self.options, None, seen, parts, self.scene)
        self._add_box((0.0, 0.0), self.arena.half, LINE_HEIGHT, LINE)
        for cell in range(self.arena.num_cells):
            self._add_cell(cell, objects.tolist())
        mujoco.mjr_render(self.view, self.scene, self.surface)
        picture = np.empty((self.pixels, self.pixels, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, self.view, self.surface)
        return picture[::-1].copy()

    def _add_cell(self, cell: int, objects: list[int]) -> None:
        number = objects.index(cell) if cell in objects else -1
        wall = number >= self.arena.num_colors
        rgb = WALL if wall else FLOOR if number < 0 else color_rgb(number)
        x, y = self.arena.center(torch.tensor(cell)).tolist()
        self._add_box((x, y), self.arena.cell_size * (0.5 - GAP / 2), WALL_HEIGHT if wall else TILE_HEIGHT, rgb)

    def _add_box(self, place: tuple[float, float], half: float, height: float, rgb: tuple[int, ...]) -> None:
        """A box on the floor, ``half`` of its side and ``height`` in meters."""
        geom = self.scene.geoms[self.scene.ngeom]
        mujoco.mjv_initGeom(
            geom,
            mujoco.mjtGeom.mjGEOM_BOX.value,
            np.array([half, half, height / 2]),
            np.array([*place, height / 2]),
            np.eye(3).flatten(),
            np.array([*(BRIGHTNESS * value for value in rgb), 1.0], np.float32),
        )
        geom.specular = geom.shininess = 0.0
        self.scene.ngeom += 1


@cache
def painter(arena: Arena, pixels: int = 224) -> Painter:
    """The one of this process for such planes and pictures.

    It is kept until the process ends: MuJoCo frees the OpenGL objects of whichever context is current at that moment,
    so that a painter that goes away could take those of another.
    """
    return Painter(arena, pixels)


@cache
def can_draw() -> bool:
    """Whether this machine has an OpenGL to draw with."""
    with suppress(UserError):
        for canvas in reversed(_canvas(8)):
            canvas.free()
        return True
    return False


def _camera(arena: Arena, name: str) -> Any:
    camera = mujoco.MjvCamera()
    if name == "above":
        camera.type = mujoco.mjtCamera.mjCAMERA_FREE.value
        camera.lookat[:] = 0.0
        camera.azimuth, camera.elevation = 90.0, -90.0  # x to the right, y up
        camera.distance = 2.7 * arena.half  # the model's field of view is 45 degrees
    else:
        camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING.value
        camera.trackbodyid = 1  # the torso
        camera.azimuth, camera.elevation, camera.distance = 90.0, -30.0, 6.0
    return camera


def _canvas(pixels: int) -> tuple[Any, Any]:
    """An OpenGL context, the current one then, and what MuJoCo draws with in it; UserError if there is none."""
    chosen = os.environ.get("MUJOCO_GL")
    headless = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    modules = ("mujoco.egl", "mujoco.osmesa") if headless and not chosen else ("mujoco.gl_context",)
    reasons = []
    for module in modules:
        try:
            context = import_module(module).GLContext(pixels, pixels)
            context.make_current()  # one without a display fails here, or in the next line
            return context, mujoco.MjrContext(ant_model(), mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except Exception as error:
            reasons.append(f"{module}: {last_line(error)}")
    raise UserError(
        f"no OpenGL to draw with was found ({'; '.join(reasons)}); install EGL or OSMesa, or set MUJOCO_GL to what "
        "this machine has."
    )
