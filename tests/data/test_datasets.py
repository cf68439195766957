"""Datasets: folders, functions and Minari's, with their spaces; and statistics of what they hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from metacontroller.data.datasets import Dataset, load_dataset, read_minari, space_meta
from metacontroller.data.statistics import normalization
from metacontroller.data.store import Episodes, TrajectoryStore
from metacontroller.data.trajectories import Trajectories
from metacontroller.errors import UserError

minari = pytest.importorskip("minari", reason="needs the extra data")


def episodes_of(observation_space: spaces.Space, action_space: spaces.Space, lengths: list[int]) -> Trajectories:
    rng = np.random.default_rng(0)
    rows = []
    for steps in lengths:
        states = np.stack([np.ravel(observation_space.sample()) for _ in range(steps + 1)])
        actions = np.stack([np.ravel(action_space.sample()) for _ in range(steps)])
        actions = actions[:, 0] if isinstance(action_space, spaces.Discrete) else actions
        ends = {"terminated": steps % 2 == 0, "truncated": steps % 2 == 1}
        rows.append({"states": states, "actions": actions, "rewards": rng.normal(size=steps), **ends})
    return Trajectories.from_episodes(rows)


BOX, CHOICE = spaces.Box(-1, 1, (3,), np.float64, seed=0), spaces.Discrete(4, seed=0)


# -- trajectories -----------------------------------------------------------------------------------------------------


def test_episodes_of_any_lengths_are_padded() -> None:
    rows = [
        {"states": [[1.0], [2.0]], "actions": [3], "rewards": [0.5], "subgoals": [1]},
        {"states": np.ones((4, 1)), "actions": torch.tensor([1, 2, 3]), "rewards": np.ones(3), "subgoals": [0, 0, 1]},
    ]
    batch = Trajectories.from_episodes(rows)
    assert batch.lengths.tolist() == [1, 3]
    assert batch.states[0, :, 0].tolist() == [1.0, 2.0, 2.0, 2.0]
    assert batch.actions[0].tolist() == [3, 0, 0]
    assert batch.subgoals is not None
    assert batch.subgoals[0].tolist() == [1, -1, -1]
    for given, back in zip(rows, batch.episodes(), strict=True):
        assert all(np.array_equal(np.asarray(given[name]), value) for name, value in back.items())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "given no episode"),
        ([{"states": [[1.0]]}], "states and actions"),
        ([{"states": [[1.0], [1.0]], "actions": [1], "colour": [1]}], "colour"),
        ([{"states": [[1.0], [1.0]], "actions": [1, 2]}], "2 states and 2 actions"),
        ([{"states": [[1.0]], "actions": []}], "at least one action"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trajectories.from_episodes(rows)


def test_a_sample_is_repeatable() -> None:
    batch = episodes_of(BOX, CHOICE, [2, 3, 4])
    first, again = (batch.sample(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.batch == 5
    assert torch.equal(first.states, again.states)


# -- folders and functions --------------------------------------------------------------------------------------------


def test_a_folder_keeps_episodes_and_spaces(tmp_path: Path) -> None:
    batch = episodes_of(BOX, CHOICE, [2, 5, 3])
    Dataset(Episodes.of(batch), BOX, CHOICE, "Some-v0").write(tmp_path / "data")
    read = load_dataset(str(tmp_path / "data"))
    assert (read.observation_space, read.action_space, read.env, read.longest) == (BOX, CHOICE, "Some-v0", 5)
    back = read.episodes.read(np.arange(3))
    assert all(torch.equal(value, getattr(back, name)) for name, value in vars(batch).items() if value is not None)
    assert read.read(np.arange(3)).states.dtype == torch.float32


def test_parts_are_joined(tmp_path: Path) -> None:
    batch = episodes_of(BOX, CHOICE, [2, 5, 3, 4])
    parts = [Episodes.of(batch.index(torch.tensor(rows))) for rows in ([0, 1], [2, 3])]
    joined = TrajectoryStore.join(tmp_path / "data", parts, most=3).read(np.arange(3))
    expected = batch.index(torch.arange(3))
    assert torch.equal(joined.states, expected.states)
    assert torch.equal(joined.actions, expected.actions)


def test_long_episodes_are_read_in_pieces() -> None:
    states = torch.arange(21.0)[None, :, None]
    whole = Trajectories(
        states=states, actions=torch.arange(20)[None], lengths=torch.tensor([20]), terminated=torch.tensor([True])
    )
    pieces = Episodes.of(whole).read(np.zeros(200, dtype=int), longest=5, rng=np.random.default_rng(0))
    assert set(pieces.lengths.tolist()) == {5}
    assert set(pieces.actions[:, 0].tolist()) == set(range(16))
    assert torch.equal(pieces.states[:, 0, 0].long(), pieces.actions[:, 0])
    assert pieces.terminated is not None
    assert torch.equal(pieces.terminated, pieces.actions[:, -1] == 19)


def made() -> Trajectories:
    return episodes_of(BOX, CHOICE, [2, 3])


def made_wrong() -> int:
    return 3


def test_a_function_gives_a_dataset_whose_spaces_the_data_show() -> None:
    dataset = load_dataset(f"{__name__}:made")
    assert not dataset.stated
    assert dataset.observation_space == spaces.Box(-np.inf, np.inf, (3,), np.float64)
    assert isinstance(dataset.action_space, spaces.Discrete)
    with pytest.raises(UserError, match="returned a int; expected a Dataset or Trajectories"):
        load_dataset(f"{__name__}:made_wrong")
    with pytest.raises(UserError, match="is no function of"):
        load_dataset(f"{__name__}:missing")


def test_statistics_are_those_of_the_whole_array() -> None:
    array = np.random.default_rng(0).normal(3.0, 2.0, (1000, 4)) * [1, 1e3, 1, 0]
    found = normalization(array, piece=7)
    np.testing.assert_allclose(found["mean"], array.mean(0), atol=1e-9)
    np.testing.assert_allclose(found["std"], [*array.std(0)[:3], 1.0])


# -- Minari -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def local_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A place for datasets, and the options to write there."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return {"data_format": "hdf5"}


MINARI_SPACES = [
    (BOX, CHOICE),
    (spaces.Box(0, 255, (6, 5, 3), np.uint8, seed=0), spaces.MultiDiscrete([3, 2], seed=0)),
    (spaces.Discrete(7, seed=0), spaces.Box(-2, 2, (2,), np.float32, seed=0)),
    (spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Discrete(3)}, seed=0), CHOICE),
]


@pytest.mark.parametrize(("observations", "actions"), MINARI_SPACES)
def test_minari_both_ways_is_exact(
    observations: spaces.Space, actions: spaces.Space, local_minari: dict[str, Any]
) -> None:
    from metacontroller.data.spaces import encode_actions, encode_observations, stack

    rows = []
    for steps in (2, 5, 3):
        states = encode_observations(
            observations, stack(observations, [observations.sample() for _ in range(steps + 1)])
        )
        taken = encode_actions(actions, np.stack([actions.sample() for _ in range(steps)]))
        rewards = np.random.default_rng(steps).normal(size=steps)
        rows.append(
            {"states": states, "actions": taken, "rewards": rewards, "terminated": steps > 2, "truncated": False}
        )
    dataset = Dataset(Episodes.of(Trajectories.from_episodes(rows)), observations, actions)
    written = dataset.write_minari("own/test-v0", **local_minari)
    assert written.total_episodes == 3
    back = read_minari("own/test-v0")
    assert (back.observation_space, back.action_space) == (observations, actions)
    for name, array in dataset.episodes.arrays.items():
        assert back.episodes.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(back.episodes.arrays[name], array)
    again = back.write_minari("own/again-v0", **local_minari)
    for one, other in zip(written.iterate_episodes(), again.iterate_episodes(), strict=True):
        for name in ("actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    read = Trajectories.from_minari("own/test-v0")
    assert read.lengths.tolist() == [2, 5, 3]


@pytest.mark.parametrize("damage", ["cut", "pipe"])
def test_a_minari_dataset_that_cannot_be_read_is_named(
    tmp_path: Path, local_minari: dict[str, Any], damage: str
) -> None:
    rows = [{"states": np.zeros((3, 1)), "actions": np.zeros(2, int), "rewards": np.zeros(2)}]
    space = spaces.Box(-1, 1, (1,), np.float64)
    Dataset(Episodes.of(Trajectories.from_episodes(rows)), space, CHOICE).write_minari("own/cut-v0", **local_minari)
    path = tmp_path / "own" / "cut-v0" / "data" / "main_data.hdf5"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:600])
    else:
        os.mkfifo(path)
    for read in (read_minari, Trajectories.from_minari):
        with pytest.raises(UserError, match="own/cut-v0"):
            read("own/cut-v0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"observation_space": 3}, "a space is 3 "),
        ({"observation_space": {"type": "Box"}}, "KeyError"),
        ({"action_space": {"type": "MultiBinary", "n": [2**20, 2**20]}}, "expected at most 16777216 entries"),
        ({"action_space": {"type": "MultiDiscrete", "nvec": [2, 2], "start": [0, 0], "dtype": "int64"}}, "2 numbers a"),
        ({"env": ["A"]}, r"env of the dataset is \['A'\]"),
    ],
)
def test_spaces_that_do_not_describe_the_data_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    episodes = Trajectories.from_episodes([{"states": np.zeros((3, 3), np.float32), "actions": np.zeros(2, int)}])
    meta = {**space_meta(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), None), **change}
    TrajectoryStore.write(tmp_path / "store", episodes, meta)
    with pytest.raises(UserError, match=rf"store\.json: .*{said}"):
        load_dataset(str(tmp_path / "store"))


def test_a_dataset_that_is_not_there_is_named(local_minari: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no Minari dataset on this machine"):
        load_dataset("D4RL/nothing-v0")
