"""Datasets: folders, functions and Minari's, with their spaces; and statistics of what they hold."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from metacontroller.data.datasets import Dataset, dataset_of, load_dataset, space_meta
from metacontroller.data.statistics import normalization, pixel_scale
from metacontroller.data.store import TrajectoryStore
from metacontroller.data.trajectories import Episodes, Trajectories
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
        ([], "no episode is given"),
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


def test_values_that_are_not_finite_are_refused_with_their_place() -> None:
    rows = [{"states": np.ones((4, 2)), "actions": np.ones((3, 1)), "rewards": np.ones(3)} for _ in range(3)]
    rows[1]["actions"][2] = np.inf
    with pytest.raises(UserError, match="episode 1 has actions that are NaN or infinite at step 2"):
        Trajectories.from_episodes(rows)


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


BROKEN = {"states": ([2, 5, 3], 1, 5), "actions": ([2, 5, 3], 2, 0), "rewards": ([4], 0, 3)}
"""Lengths of episodes, and in which of them, at which step, a value is not finite."""


def broken(name: str) -> Trajectories:
    lengths, episode, step = BROKEN[name]
    whole = episodes_of(BOX, spaces.Box(-1, 1, (1,), np.float64, seed=0), lengths)
    getattr(whole, name)[episode, step] = np.nan
    return whole


def broken_states() -> Trajectories:
    return broken("states")


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_with_a_value_that_is_not_finite_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    """In a mapped array of all episodes side by side: the last state and the first action of an episode are told
    apart from their neighbors'."""
    TrajectoryStore.write(tmp_path / "data", broken(name))
    _, episode, step = BROKEN[name]
    with pytest.raises(UserError, match=rf"data'?: episode {episode} has {name} that are NaN .* at step {step}"):
        load_dataset(str(tmp_path / "data"))


def test_a_function_with_a_value_that_is_not_finite_is_refused_with_its_place() -> None:
    with pytest.raises(UserError, match=r"broken_states'?: episode 1 has states that are NaN or infinite at step 5"):
        load_dataset(f"{__name__}:broken_states")


@pytest.mark.parametrize("stated", [True, False])
def test_one_number_a_step_is_what_a_model_reads(stated: bool) -> None:
    """Whole numbers without an axis, or with one too many, are choices; other numbers are vectors of one entry."""
    rng = np.random.default_rng(0)
    choices = {"states": rng.integers(5, size=8), "actions": rng.integers(3, size=(7, 1)), "lengths": np.array([3, 4])}
    choices["states"] = np.concatenate([choices["states"], [4]])
    meta = space_meta(spaces.Discrete(5), spaces.Discrete(3), None) if stated else {}
    choices["actions"][0] = 2
    dataset = dataset_of(Episodes(choices), meta)
    assert (dataset.observation_space, dataset.action_space) == (spaces.Discrete(5), spaces.Discrete(3))
    read = dataset.read(np.array([1, 0]))
    assert read.states.shape == (2, 5, 1)
    assert read.states[0, :, 0].tolist() == choices["states"][4:].tolist()
    assert read.actions[0].tolist() == choices["actions"][3:, 0].tolist()
    numbers = {name: value if name == "lengths" else value * 0.5 for name, value in choices.items()}
    meta = space_meta(spaces.Box(0, 9, (1,)), spaces.Box(0, 9, (1,)), None) if stated else {}
    read = dataset_of(Episodes(numbers), meta).read(np.array([1]))
    assert read.states.shape == (1, 5, 1)
    assert read.actions.shape == (1, 4, 1)


def test_statistics_are_relative_to_the_size_of_the_values(capsys: pytest.CaptureFixture) -> None:
    """Meters and micrometers are scaled alike; constant is what float32 cannot tell apart, and it is named once."""
    rng = np.random.default_rng(0)
    meters = rng.normal(3.0, 2.0, (1000, 2))
    for unit in (1.0, 1e-3, 1e-6, 1e-12, 1e6):
        found = normalization(meters * unit)
        np.testing.assert_allclose(found["std"], meters.std(0) * unit)
        np.testing.assert_allclose(found["mean"], meters.mean(0) * unit)
    assert capsys.readouterr().err == ""
    clock = 1e6 + rng.normal(size=1000)  # which float32 tells to 0.06
    array = np.stack([clock, np.full(1000, 0.1), np.zeros(1000), 1.0 + 1e-9 * rng.normal(size=1000)], 1)
    found = normalization(array, "observations", piece=7)
    np.testing.assert_allclose(found["std"], [clock.std(), 1.0, 1.0, 1.0])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "3 of 4 entries of the observations are constant in the data and are not scaled: 1, 2, 3." in said


@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 3), (3, 5, 6)])
def test_the_scale_of_pixels_is_that_of_each_channel(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, *shape), np.uint8)
    axis = {(9, 8): None, (5, 6, 3): 3, (3, 5, 6): 1}[shape]
    others = tuple(index for index in range(images.ndim) if index != axis)
    found = pixel_scale(images, shape, piece=7)
    np.testing.assert_allclose(found["mean"], images.mean(others).reshape(-1))
    np.testing.assert_allclose(found["std"], images.std(others).reshape(-1))
    assert pixel_scale(np.full_like(images, 7), shape)["std"] == [1.0] * len(found["std"])


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
    back = load_dataset("own/test-v0")
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


def buffer(observations: Any = 5, actions: Any = 4, rewards: int = 4) -> Any:
    """An episode as Minari takes it, of four steps unless given, with so many entries or with those."""
    from minari.data_collector import EpisodeBuffer

    ends = np.arange(rewards) == rewards - 1
    arrays: dict[str, Any] = {
        "observations": np.ones((observations, 3)) if isinstance(observations, int) else observations,
        "actions": np.ones(actions, int) if isinstance(actions, int) else actions,
        "rewards": np.ones(rewards, np.float32),
        "terminations": ends,
        "truncations": ~ends,
    }
    return EpisodeBuffer(**arrays, infos={})


def written(buffers: list[Any], options: dict[str, Any], observations: Any = BOX, actions: Any = CHOICE) -> str:
    """The ID of a dataset that Minari wrote, as others call it; Minari compares no lengths."""
    given = {"observation_space": observations, "action_space": actions, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not given
        minari.create_dataset_from_buffers("own/test-v0", buffers, **given)
    return "own/test-v0"


READERS = pytest.mark.parametrize("read", [load_dataset, Trajectories.from_minari], ids=["dataset", "from_minari"])


@READERS
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"observations": 4}, "episode 1 has 4 states and 4 actions"),
        ({"actions": 3}, "episode 1 has 5 states and 3 actions"),
        ({"rewards": 3}, "episode 1 has 3 rewards and 4 actions"),
        ({"observations": np.full((5, 3), np.nan)}, "episode 1 has states that are NaN or infinite at step 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_episode_that_would_shift_all_later_ones_is_refused(
    read: Any, wrong: dict[str, Any], said: str, local_minari: dict[str, Any]
) -> None:
    name = written([buffer(), buffer(**wrong), buffer()], local_minari)
    with pytest.raises(UserError, match=said):
        read(name)


@READERS
def test_parts_of_observations_of_other_lengths_are_refused(read: Any, local_minari: dict[str, Any]) -> None:
    space = spaces.Dict({"a": BOX, "b": BOX})
    episodes = [buffer({"a": np.ones((5, 3)), "b": np.ones((5 - cut, 3))}) for cut in (0, 0, 1)]
    name = written(episodes, local_minari, space)
    with pytest.raises(UserError, match=r"episode 2 of the Minari dataset own/test-v0 does not fit its spaces"):
        read(name)


@READERS
@pytest.mark.parametrize("kind", [spaces.Dict, spaces.Tuple])
def test_a_sound_dataset_with_actions_that_no_model_takes_is_told_so(
    read: Any, kind: Any, local_minari: dict[str, Any]
) -> None:
    parts = {"x": np.ones(4, int), "y": np.ones((4, 3))}
    space = {"x": spaces.Discrete(2), "y": spaces.Box(-1, 1, (3,), np.float64)}
    one, actions = (space, parts) if kind is spaces.Dict else (tuple(space.values()), tuple(parts.values()))
    name = written([buffer(actions=actions)], local_minari, actions=kind(one))
    with pytest.raises(
        UserError, match=r"the action space is .*; expected Discrete, MultiDiscrete, MultiBinary or Box"
    ):
        read(name)


def test_minari_keeps_how_the_environment_was_made(local_minari: dict[str, Any]) -> None:
    env = gymnasium.make("FrozenLake-v1", is_slippery=False, max_episode_steps=30)
    rows = [{"states": np.array([[0], [0]]), "actions": np.array([3]), "rewards": np.zeros(1)}]
    observed, chosen = env.observation_space, env.action_space
    made = Dataset(Episodes.of(Trajectories.from_episodes(rows)), observed, chosen)
    made.write_minari("own/ice-v0", **{**local_minari, "env": env})
    back = load_dataset("own/ice-v0")
    assert (back.env, back.env_steps) == ("FrozenLake-v1", 30)
    assert json.loads(back.env_kwargs or "")["is_slippery"] is False
    assert back.meta()["env_kwargs"] == back.env_kwargs


@READERS
def test_a_folder_whose_name_minari_refuses_hides_no_other(
    read: Any, tmp_path: Path, local_minari: dict[str, Any]
) -> None:
    name = written([buffer(), buffer()], local_minari)
    (tmp_path / "odd name" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="Malformed dataset ID"):
        minari.list_local_datasets()
    found = read(name)
    assert (found.lengths if isinstance(found, Trajectories) else found.episodes.lengths).tolist() == [4, 4]
    with pytest.raises(UserError, match=r"no Minari dataset on this machine \(there: not known, .*odd name"):
        read("own/other-v0")


def test_a_file_of_metadata_is_measured_before_it_is_read(
    local_minari: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minari reads one of any size."""
    name = written([buffer()], local_minari)
    monkeypatch.setattr("metacontroller.storage.files.MAX_JSON_BYTES", 10)
    with pytest.raises(UserError, match=r"metadata\.json has \d+ bytes where at most 10 were expected"):
        load_dataset(name)


def test_images_are_written_without_loss_and_rewards_keep_their_type(local_minari: dict[str, Any]) -> None:
    """Minari stores images from 32 x 32 on as JPEG unless told otherwise, which changes most values."""
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    by_others = load_dataset(written([buffer(images)], local_minari, space))
    assert (by_others.episodes.arrays["states"] != images).mean() > 0.5
    by_others.episodes.arrays["states"] = images
    by_others.write_minari("own/exact-v0", **local_minari)
    back = load_dataset("own/exact-v0").episodes.arrays
    np.testing.assert_array_equal(back["states"], images)
    assert back["rewards"].dtype == np.float32


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
    for read in (load_dataset, Trajectories.from_minari):
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


OTHER: dict[str, Any] = {}
"""Actions of two steps that `other_choices` returns."""


def other_choices() -> Dataset:
    episodes = Trajectories.from_episodes([{"states": np.zeros((3, 3), np.float32), **OTHER}])
    return Dataset(Episodes.of(episodes), spaces.Box(-1, 1, (3,)), spaces.Discrete(3))


@pytest.mark.parametrize(("actions", "said"), [([0, 3], "0..3"), ([-1, 0], "-1..0"), ([0.0, 1.5], r"0\.0\.\.1\.5")])
def test_other_numbers_than_the_choices_are_refused(tmp_path: Path, actions: list[float], said: str) -> None:
    OTHER["actions"] = np.array(actions)
    made = other_choices()
    made.write(tmp_path / "data")
    for name in (str(tmp_path / "data"), f"{__name__}:other_choices"):
        with pytest.raises(UserError, match=rf"its actions lie in {said}; expected whole numbers in 0\.\.2"):
            load_dataset(name)


def test_a_dataset_that_is_not_there_is_named(local_minari: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no Minari dataset on this machine"):
        load_dataset("D4RL/nothing-v0")


def test_the_digest_tells_content_and_not_place(tmp_path: Path) -> None:
    batch = episodes_of(BOX, CHOICE, [2, 5, 3])
    one, other = (TrajectoryStore.write(tmp_path / name, batch) for name in ("a", "b"))
    changed = episodes_of(BOX, CHOICE, [2, 5, 3])
    changed.actions[1, 2] = (changed.actions[1, 2] + 1) % 4
    assert one.digest() == other.digest() != TrajectoryStore.write(tmp_path / "c", changed).digest()
    held = Episodes.of(batch).digest()
    assert held == Episodes.of(batch).digest() != Episodes.of(changed).digest()
    del one.meta["listed"]  # as in folders of format 1
    assert one.digest() == held


def test_a_minari_dataset_names_its_environment_and_what_it_was_made_with(local_minari: dict[str, Any]) -> None:
    spec = gymnasium.spec("CartPole-v1")
    needs = ["mujoco==3.2.3", "gymnasium>=1.0"]
    name = written([buffer()], {**local_minari, "env": spec, "requirements": needs})
    record = load_dataset(name).record
    assert {**record, "data": ""} == {"environment": "CartPole-v1", "mujoco": "3.2.3", "data": ""}
