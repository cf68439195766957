"""Which episodes of a dataset are held out: how many, and that content alone decides."""

from __future__ import annotations

import numpy as np
import pytest

from metacontroller.data.splits import steps_outside, validation_rows
from metacontroller.data.statistics import normalization
from metacontroller.data.trajectories import Episodes, Trajectories


def episodes(numbers: list[int]) -> Episodes:
    """An episode of two steps for each number; equal numbers make equal ones."""
    return Episodes.of(
        Trajectories.from_episodes(
            {"states": np.full((3, 1), number, np.float32), "actions": np.array([number % 2, 0])} for number in numbers
        )
    )


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(1, 0.1, 0), (2, 0.1, 1), (3, 0.1, 1), (40, 0.1, 4), (40, 0.5, 20), (40, 0.0, 0)]
)
def test_about_the_share_and_at_least_one_of_two(count: int, share: float, expected: int) -> None:
    rows = validation_rows(episodes(list(range(count))), share)
    assert len(rows) == len(set(rows)) == expected


def test_one_that_occurs_again_and_again_is_not_held_out() -> None:
    assert len(validation_rows(episodes([1] * 50 + [2] * 50), 0.1)) == 0
    often = validation_rows(episodes([7] * 90 + list(range(10, 20))), 0.1)
    assert set(often) == set(range(90, 100))


def test_order_changes_nothing_and_more_data_little() -> None:
    numbers = list(range(200))
    held_out = {numbers[row] for row in validation_rows(episodes(numbers), 0.1)}
    assert {numbers[::-1][row] for row in validation_rows(episodes(numbers[::-1]), 0.1)} == held_out
    more = list(range(220))
    assert len(held_out & {more[row] for row in validation_rows(episodes(more), 0.1)}) >= 15


@pytest.mark.parametrize("piece", [2, 100])
def test_statistics_are_those_of_what_is_trained_on(piece: int) -> None:
    data = episodes([1, 5, 1000, 9])
    used = steps_outside(data, "states", np.array([2]))
    assert used.tolist() == [True] * 6 + [False] * 3 + [True] * 3
    assert steps_outside(data, "actions", np.array([2])).tolist() == [True] * 4 + [False] * 2 + [True] * 2
    found = normalization(data.arrays["states"], used=used, piece=piece)
    assert found["mean"] == pytest.approx([5.0])
    assert found["std"] == pytest.approx([np.std([1, 5, 9])])
