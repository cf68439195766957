"""Spaces as arrays and back: equal to Gymnasium's flatten, exact both ways, readable from JSON."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from metacontroller.data.spaces import (
    action_options,
    decode_actions,
    decode_observations,
    encode_actions,
    encode_observations,
    encoder_options,
    environment_actions,
    readable,
    space_from_json,
    space_to_json,
    stack,
    without_text,
)
from metacontroller.errors import UserError

SPACES: list[tuple[spaces.Space, dict[str, Any]]] = [
    (spaces.Box(-1, 1, (2, 3), np.float32), {"num_continuous": 6}),
    (spaces.Box(-np.inf, np.inf, (4,), np.float64), {"num_continuous": 4}),
    (spaces.Box(0, 255, (6, 5, 3), np.uint8), {"image": [6, 5, 3]}),
    (spaces.Box(0, 255, (128,), np.uint8), {"num_continuous": 128}),
    (spaces.Discrete(5, start=-2), {"num_discrete": [5]}),
    (spaces.MultiDiscrete([3, 2], start=[1, 0]), {"num_discrete": [3, 2]}),
    (spaces.MultiBinary([2, 2]), {"num_discrete": [2, 2, 2, 2]}),
    (
        spaces.Dict({"b": spaces.Discrete(3), "a": spaces.Box(-1, 1, (2,), np.float32), "c": spaces.MultiBinary(2)}),
        {"num_continuous": 7},
    ),
    (
        spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Dict({"x": spaces.Box(0, 9, (1,), np.uint8)})]),
        {"num_continuous": 6},
    ),
]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(np.array_equal(one, other)) and np.asarray(one).dtype == np.asarray(other).dtype


@pytest.mark.parametrize(("space", "options"), SPACES)
def test_observations_come_back_as_they_were(space: spaces.Space, options: dict[str, Any]) -> None:
    space.seed(0)
    values = stack(space, [space.sample() for _ in range(7)])
    array = encode_observations(space, values)
    assert encoder_options(space) == options
    assert same(decode_observations(space, array), values)
    assert space_from_json(space_to_json(space)) == space


@pytest.mark.parametrize("space", [space for space, options in SPACES if "num_continuous" in options])
def test_vectors_are_those_of_gymnasium(space: spaces.Space) -> None:
    space.seed(0)
    values = [space.sample() for _ in range(7)]
    np.testing.assert_array_equal(
        encode_observations(space, stack(space, values)),
        np.stack([np.asarray(spaces.flatten(space, value)) for value in values]),
    )


@pytest.mark.parametrize("space", [space for space, _ in SPACES if not isinstance(space, spaces.Dict | spaces.Tuple)])
def test_actions_come_back_as_they_were(space: spaces.Space) -> None:
    space.seed(0)
    values = np.stack([space.sample() for _ in range(7)])
    assert same(decode_actions(space, encode_actions(space, values)), values)


def test_actions_of_a_box_of_whole_numbers_are_the_nearest_ones() -> None:
    space = spaces.Box(-2, 3, (4,), np.int32)
    chosen = environment_actions(space, np.array([[0.9, -1.6, 7.0, -7.0], [2.4, 0.2, -0.2, 1.51]], np.float32))
    assert chosen.tolist() == [[1, -2, 3, -2], [2, 0, 0, 2]]
    assert chosen.dtype == np.int32
    floats = spaces.Box(-2, 3, (2,), np.float32)
    assert environment_actions(floats, np.array([[0.9, 7.0]])).tolist() == [[np.float32(0.9), 3.0]]


def test_what_actions_a_model_can_take() -> None:
    assert action_options(spaces.Discrete(4, start=1)) == {"num_discrete": 4}
    assert action_options(spaces.MultiDiscrete([3, 2])) == {"num_discrete": [3, 2]}
    assert action_options(spaces.Box(-1, 1, (2, 2))) == {"num_continuous": 4}
    with pytest.raises(UserError, match=r"expected Discrete, MultiDiscrete, MultiBinary or Box"):
        action_options(spaces.Dict({"x": spaces.Discrete(2)}))


def test_text_is_left_out() -> None:
    space = spaces.Dict({"text": spaces.Text(5), "x": spaces.Tuple([spaces.Discrete(2), spaces.Text(5)])})
    assert readable(space) == spaces.Dict({"x": spaces.Tuple([spaces.Discrete(2)])})
    assert without_text(space, {"text": "go", "x": (1, "on")}) == {"x": (1,)}
    with pytest.raises(UserError, match="nothing but text"):
        readable(spaces.Text(5))
    with pytest.raises(UserError, match="expected Box"):
        readable(spaces.Dict({"x": spaces.Sequence(spaces.Discrete(2))}))


def test_the_mission_of_a_minigrid_is_left_out() -> None:
    pytest.importorskip("minigrid", reason="needs the extra babyai")
    space = gymnasium.make("minigrid:MiniGrid-Empty-5x5-v0").observation_space
    assert encoder_options(readable(space)) == {"num_continuous": 7 * 7 * 3 + 4}
