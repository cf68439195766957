"""Pictures of the ant: cells where they belong, from above and by a camera that follows."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

pytest.importorskip("mujoco", reason="the extra ant is not installed")

from helpers import load_script
from metacontroller.domains.ant_pinpad import ENV_ID, engine, rendering
from metacontroller.domains.ant_pinpad.gymnasium_env import AntPinpadEnv, AntPinpadVectorEnv
from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.observation import STATE_SIZE
from metacontroller.errors import UserError

ARENA = Arena(size=3, cell_size=2.0)
OBJECTS = torch.tensor([0, 5, 6, 7, 2])
"""Colors in cells 0, 5, 6 and 7, the wall in cell 2."""

drawing = pytest.mark.skipif(not rendering.can_draw(), reason="this machine has no OpenGL to draw with")


def standing(x: float, y: float) -> torch.Tensor:
    state = torch.zeros(STATE_SIZE, dtype=torch.float64)
    state[:4] = torch.tensor([x, y, 0.6, 1.0])
    return state


@drawing
def test_every_cell_has_its_color() -> None:
    picture = rendering.painter(ARENA, 240).draw(standing(0.0, 0.0), OBJECTS)
    assert picture.shape == (240, 240, 3)
    assert picture.dtype == np.uint8

    def tone(cell: int) -> np.ndarray:
        """The color in the middle of a cell, as shares."""
        row, column = divmod(cell, 3)
        y, x = 120 + (row - 1) * 70, 120 + (column - 1) * 70
        seen = picture[y - 4 : y + 4, x - 4 : x + 4].mean((0, 1))
        return seen / seen.sum()

    for color, cell in enumerate(OBJECTS[:4].tolist()):
        expected = np.array(rendering.color_rgb(color))
        assert np.abs(tone(cell) - expected / expected.sum()).max() < 0.08
    assert np.abs(tone(1) - 1 / 3).max() < 0.02  # an empty cell is gray
    assert picture[44:56, 184:196].mean() < 0.5 * picture[44:56, 114:126].mean()  # the wall is darker


@drawing
def test_one_camera_stays_and_the_other_follows() -> None:
    painter, blue = rendering.painter(Arena(size=3, num_colors=1, num_walls=0, cell_size=2.0), 64), torch.tensor([8])

    def middle(x: float, y: float, camera: str) -> tuple[float, float]:
        """Row and column around which the ant's own color is seen."""
        red, _, low = painter.draw(standing(x, y), blue, camera).astype(int).transpose(2, 0, 1)
        rows, columns = np.nonzero((red > 100) & (red > low + 40))
        return float(rows.mean()), float(columns.mean())

    assert middle(0.0, 0.0, "above") == pytest.approx((31.5, 31.5), abs=2)
    assert middle(-2.0, 2.0, "above") == pytest.approx((11, 11), abs=3)
    assert middle(0.0, 0.0, "follow") == pytest.approx(middle(-2.0, 2.0, "follow"), abs=2)


@drawing
def test_environments_return_pictures() -> None:
    check_env(gymnasium.make(ENV_ID, render_mode="rgb_array", camera="follow").unwrapped)
    vector = AntPinpadVectorEnv(2, render_mode="rgb_array", threads=1)
    vector.reset(seed=0)
    frames = vector.render()
    assert frames is not None
    assert [frame.shape for frame in frames] == [(224, 224, 3)] * 2
    silent = AntPinpadEnv()
    silent.reset(seed=0)
    assert silent.render() is None


def test_without_opengl_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: str) -> None:
        raise OSError(f"{module} has no library")

    monkeypatch.setattr(rendering, "import_module", refuse)
    with pytest.raises(ValueError, match=r"no OpenGL to draw with was found .*OSError.*; install EGL or OSMesa"):
        rendering.Painter(ARENA)


def test_a_context_that_cannot_be_drawn_in_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDisplay:
        """As of GLFW without a display: it is made, and nothing can be drawn in it."""

        def __init__(self, *size: int) -> None: ...

        def make_current(self) -> None:
            raise RuntimeError("no display")

    monkeypatch.setattr(rendering, "import_module", lambda name: SimpleNamespace(GLContext=NoDisplay))
    assert not rendering.can_draw.__wrapped__()
    with pytest.raises(UserError, match=r"no OpenGL to draw with was found \(mujoco.*: RuntimeError: no display"):
        rendering.Painter(ARENA)


def test_a_mujoco_that_cannot_be_imported_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Any:
        raise RuntimeError("invalid value for environment variable MUJOCO_GL: nonsense")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(
        UserError, match=r"mujoco cannot be imported \(RuntimeError: invalid value .*; set MUJOCO_GL to"
    ):
        load_script(Path(engine.__file__))
