"""Grids drawn as text, for tests in which every cell matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.domains.pinpad.layouts import Layouts
from metacontroller.domains.pinpad.tasks import pad_tasks


def read_picture(picture: str, max_steps: int = 100) -> tuple[PinpadConfig, Layouts]:
    """One layout from its picture: digits are colors, ``#`` walls, ``A`` the agent, ``.`` empty cells."""
    rows = picture.split()
    cells = "".join(rows)
    colors = sorted(character for character in cells if character.isdigit())
    walls = [cell for cell, character in enumerate(cells) if character == "#"]
    config = PinpadConfig(size=len(rows), num_colors=len(colors), num_walls=len(walls), max_steps=max_steps)
    objects = [cells.index(color) for color in colors] + walls
    return config, Layouts(torch.tensor([objects]), torch.tensor([cells.index("A")]))


def start_batch(picture: str, task: Sequence[int], copies: int = 1, max_steps: int = 100) -> PinpadBatch:
    """Identical grids from one picture, all with the same task."""
    config, layouts = read_picture(picture, max_steps)
    tasks, lengths = pad_tasks([task] * copies)
    return PinpadBatch(config, layouts.repeat(copies), tasks, lengths)


@pytest.fixture
def picture() -> Callable[..., tuple[PinpadConfig, Layouts]]:
    """`read_picture` as a fixture."""
    return read_picture


@pytest.fixture
def start() -> Callable[..., PinpadBatch]:
    """`start_batch` as a fixture."""
    return start_batch
