"""What the ant observes, and what can be read back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.observation import (
    ORIENTATION,
    PROPRIOCEPTION,
    heading,
    objects_of,
    observation_size,
    observe,
    parts_of,
    state_of,
    symexp,
    symlog,
)
from metacontroller.domains.ant_pinpad.symmetry import shift_colors, turn_around, turn_body, turn_world
from metacontroller.domains.pinpad.layouts import sample_layouts
from metacontroller.models.encoders import PlaneEncoder

ARENA = Arena(cell_size=2.0)


def random_states(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """State, cell and objects of ants with any posture."""
    generator = torch.Generator().manual_seed(seed)
    objects = sample_layouts(ARENA, n, generator).objects
    state = torch.randn((n, 29), generator=generator, dtype=torch.float64) * 2
    state[:, :2] = (torch.rand((n, 2), generator=generator, dtype=torch.float64) * 2 - 1) * ARENA.half
    state[:, 3:7] /= state[:, 3:7].norm(dim=1, keepdim=True)
    return state, ARENA.cell(state[:, :2]), objects


def test_symlog_is_undone_by_symexp() -> None:
    values = torch.tensor([-50.0, -1.0, 0.0, 1e-3, 2.0], dtype=torch.float64)
    assert symlog(torch.tensor(math.e - 1)).item() == pytest.approx(1.0)
    assert torch.allclose(symexp(symlog(values)), values)


def test_an_observation_has_its_parts_in_their_units() -> None:
    state, cell, objects = random_states(20)
    observation = observe(ARENA, state, cell, objects)
    assert observation.shape == (20, observation_size(ARENA)) == (20, 41)
    assert observation.dtype == torch.float32
    parts = parts_of(ARENA, observation)
    assert float(parts.place.abs().max()) <= 1
    assert float(parts.local.abs().max()) <= 1
    x, y = parts.place.T * 4.0
    column, row = torch.floor((x + 4) / 2), torch.floor((4 - y) / 2)
    assert torch.equal((row * 4 + column).long(), cell)
    assert torch.allclose(parts.local[:, 0], x - (column * 2 - 3), atol=1e-5)
    assert torch.allclose(observation[:, 0], symlog(state[:, 2]).float())
    wall = parts.relative[:, 4] + parts.place
    assert torch.equal(ARENA.cell(wall.double() * 4), objects[:, 4])


def test_state_and_layout_can_be_read_back() -> None:
    state, cell, objects = random_states(50)
    observation = observe(ARENA, state, cell, objects)
    assert torch.allclose(state_of(ARENA, observation), state, atol=1e-4, rtol=1e-5)
    assert torch.equal(objects_of(ARENA, observation), objects)
    several = torch.stack([observation, observation], 1)  # with a time axis
    assert torch.equal(objects_of(ARENA, several)[:, 1], objects)


def test_heading_is_the_yaw() -> None:
    yaw = torch.tensor([0.3, 2.0, -2.5], dtype=torch.float64)
    quaternion = torch.stack([(yaw / 2).cos(), 0 * yaw, 0 * yaw, (yaw / 2).sin()], 1)
    assert torch.allclose(heading(quaternion), torch.stack([yaw.cos(), yaw.sin()], 1))


def turned(state: Tensor, objects: Tensor, quarter: int) -> tuple[Tensor, Tensor]:
    """The world turned by so many right angles: by rotation matrices, and by moving the cells."""
    angle = quarter * math.pi / 2
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    out = state.clone()
    out[:, :2], out[:, 15:17] = state[:, :2] @ matrix.T, state[:, 15:17] @ matrix.T
    half = torch.tensor([math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)]).double()
    w1, v1 = half[0], half[1:].expand(len(state), 3)
    w2, v2 = state[:, 3], state[:, 4:7]
    out[:, 3] = w1 * w2 - (v1 * v2).sum(1)
    out[:, 4:7] = w1 * v2 + w2[:, None] * v1 + torch.linalg.cross(v1, v2)
    return out, ARENA.cell(ARENA.center(objects) @ matrix.T)


def test_a_quarter_turn_shows_the_turned_world() -> None:
    state, cell, objects = random_states(60)
    observation = observe(ARENA, state, cell, objects)
    images = []
    for quarter in range(4):
        moved, places = turned(state, objects, quarter)
        images.append(observe(ARENA, moved, ARENA.cell(moved[:, :2]), places))
    for quarter, image in enumerate(images):
        shown = turn_world(ARENA, observation[:, None].expand(-1, 3, -1), torch.full((60,), quarter))
        assert torch.equal(shown[:, 0], shown[:, 2])
        assert torch.allclose(shown[:, 0], image, atol=1e-4)


def test_a_turn_with_renamed_legs_is_that_of_world_and_body() -> None:
    """Against the world turned and the body seen from another leg, but for the sign of the quaternion, which stays; so
    that nothing tells that the world was turned where the yaw is within 45 degrees."""
    state, cell, objects = random_states(200)
    states, quarter = observe(ARENA, state, cell, objects).double(), torch.arange(200) % 4
    shown = turn_around(states[:, None], quarter)[:, 0]
    world = turn_world(ARENA, states[:, None], quarter)[:, 0]
    body = symlog(turn_body(symexp(world[:, :PROPRIOCEPTION]), -quarter % 4))
    expected = torch.cat([body, world[:, PROPRIOCEPTION:]], 1)
    sign = torch.where(quarter > 0, -1.0, 1.0).double()
    expected[:, ORIENTATION] *= sign[:, None]
    torch.testing.assert_close(shown, expected)
    assert torch.equal(shown[:, [1, 4]], states[:, [1, 4]])


def test_colors_are_counted_on() -> None:
    state, cell, objects = random_states(30)
    states, shift = observe(ARENA, state, cell, objects)[:, None].expand(-1, 2, -1), torch.arange(30) % 4
    colors = [objects[row, :4].roll(int(shift[row])) for row in range(30)]
    places = torch.cat([torch.stack(colors), objects[:, 4:]], 1)
    shown = shift_colors(ARENA, states, shift)
    assert torch.equal(shown[:, 0], observe(ARENA, state, cell, places))
    assert torch.equal(shown[:, 0], shown[:, 1])


def test_the_encoder_reads_the_cells_of_an_observation() -> None:
    """Beside its linear map, against the cells that the observation was made of: one row of a table for the ant's cell,
    and for each object one by how many rows and columns it lies away, in a part of the width of its own."""
    state, cell, objects = random_states(300)
    states = observe(ARENA, state, cell, objects)[:, None]
    size, count = ARENA.size, objects.shape[1]
    encoder = PlaneEncoder(20, dim_state=states.shape[-1], size=size, objects=count)
    own, others = encoder.cells(states)
    assert len(own.unique()) == size**2
    assert len(set(zip(own.flatten().tolist(), cell.tolist(), strict=True))) == size**2
    rows, columns = objects // size - cell[:, None] // size, objects % size - cell[:, None] % size
    for number in range(count):
        there = zip(rows[:, number].tolist(), columns[:, number].tolist(), strict=True)
        pairs = set(zip(others[:, 0, number].tolist(), there, strict=True))
        assert len(pairs) == len({row for row, _ in pairs}) == len({offset for _, offset in pairs})
        low, high = number * encoder.span**2, (number + 1) * encoder.span**2
        assert bool(((others[..., number] >= low) & (others[..., number] < high)).all())
    expected = encoder.linear(states) + encoder.own.weight[own]
    part = 20 // (count + 1)
    for number in range(count):
        expected[..., number * part : (number + 1) * part] += encoder.others.weight[others[..., number]]
    torch.testing.assert_close(encoder(states), expected)
    assert encoder(torch.full_like(states, math.nan)).shape == (300, 1, 20)


def test_a_width_without_a_part_for_each_object_is_refused() -> None:
    with pytest.raises(ValueError, match="dim is 5; expected at least 6"):
        PlaneEncoder(5, dim_state=41, size=4, objects=5)
