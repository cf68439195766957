"""Collecting episodes of a policy: seeds, successes, exceptions, resuming."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from metacontroller.data.datasets import load_dataset
from metacontroller.data.store import TrajectoryStore
from metacontroller.domains.guarded_environment import BEGUN, LOST
from metacontroller.errors import UserError
from metacontroller.recipes import collect as module
from metacontroller.recipes.collect import CollectConfig, collect


class Guess(gymnasium.Env):
    """A number below 5; an action that equals it is paid. 4 is an exception."""

    observation_space = spaces.Discrete(5)
    action_space = spaces.Discrete(5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(5))
        return self.number, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.number == 4:
            raise RuntimeError("four")
        return self.number, float(action == self.number), True, False, {}


gymnasium.register("collect/Guess-v0", Guess)  # type: ignore[arg-type]


def hop(observation: Any, env: Any) -> Any:
    return env.action_space.sample()


def test_a_dataset_keeps_the_record_of_its_environment(tmp_path: Path) -> None:
    """The ID, and the versions of Gymnasium, of this package and of the engine that the environment holds."""
    pytest.importorskip("mujoco", reason="needs the extra ant")
    collect(CollectConfig(env="Hopper-v5", policy=f"{__name__}:hop", episodes=2), tmp_path / "data", quiet=True)
    versions = {name: metadata.version(name) for name in ("gymnasium", "mujoco", "metacontroller-rl")}
    record = {"environment": "Hopper-v5", **versions}
    assert TrajectoryStore(tmp_path / "data").meta["versions"] == record
    dataset = load_dataset(str(tmp_path / "data"))
    assert dataset.record == {**record, "data": dataset.episodes.digest()}
    assert load_dataset(str(dataset.write(tmp_path / "copy").path)).record == dataset.record


def small_or_wrong(observation: Any, env: Any) -> Any:
    return min(int(observation), 2)


def wrong(observation: Any, env: Any) -> Any:
    return (int(observation) + 1) % 4


class Push(gymnasium.Env):
    """A force of two numbers within -1 and 1, shown in the next observation; four steps."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return [0, 0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return (action if self.steps % 2 else np.asarray(action, np.float64)), 1.0, False, self.steps == 4, {}


class Endless(Push):
    """No step is the last."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return action, 1.0, False, False, {}


class Falling(Guess):
    """Some episodes raise in the middle; the others show what they were paid for."""

    def __init__(self) -> None:
        self.action_space = spaces.Discrete(1000)
        self.observation_space = spaces.Discrete(1000)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.number == 4:
            raise RuntimeError("four")
        return action, 0.0, False, self.np_random.random() < 0.3, {}


class Leaves(Push):
    """Leaves the bounds that it declares after two steps."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, *others = super().step(action)
        return np.array([7, 0] if self.steps > 2 else [0, 0], np.float32), *others  # type: ignore[return-value]


gymnasium.register("collect/Leaves-v0", Leaves)  # type: ignore[arg-type]
gymnasium.register("collect/Push-v0", Push)  # type: ignore[arg-type]
gymnasium.register("collect/Endless-v0", Endless)  # type: ignore[arg-type]
gymnasium.register("collect/Falling-v0", Falling)  # type: ignore[arg-type]

ANSWERS: list[Any] = []
"""What `answering` returns, one after the other, the last again and again."""


def answering(observation: Any, env: Any) -> Any:
    return ANSWERS.pop(0) if len(ANSWERS) > 1 else ANSWERS[0]


def sampling(observation: Any, env: Any) -> Any:
    return env.action_space.sample()


CONFIG = CollectConfig(env="collect/Guess-v0", policy=f"{__name__}:small_or_wrong", episodes=90)


def test_as_many_episodes_as_asked_for_are_kept(tmp_path: Path) -> None:
    done = collect(CONFIG, tmp_path / "data", quiet=True)
    dataset = load_dataset(str(tmp_path / "data"))
    assert len(dataset.episodes) == done["kept"] == 90
    assert done["played"] == 45 * 3  # in parts of equal size
    assert done["lost"] > 0
    assert (done["unsolved"], done["surplus"]) == (0, 135 - 90 - done["lost"])
    episodes = dataset.episodes.read(np.arange(90))
    assert set(episodes.states.flatten().tolist()) == {0, 1, 2, 3}  # those that raised are left out
    assert episodes.rewards is not None
    assert done["success"] == pytest.approx(float(episodes.rewards.mean()))
    assert (dataset.env, dataset.action_space) == ("collect/Guess-v0", spaces.Discrete(5))
    assert not (tmp_path / "data" / "parts").exists()


def test_successes_alone_are_kept_if_asked(tmp_path: Path) -> None:
    done = collect(replace(CONFIG, only_successes=True), tmp_path / "data", quiet=True)
    assert (done["kept"], done["success"]) == (90, 1.0)
    assert done["unsolved"] > 0
    assert done["played"] == sum(done[name] for name in ("kept", "lost", "unsolved", "surplus"))
    states = TrajectoryStore(tmp_path / "data").read(np.arange(90)).states
    assert set(states.flatten().tolist()) == {0, 1, 2}


def test_a_policy_that_never_succeeds_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ATTEMPTS", 1)
    config = replace(CONFIG, policy=f"{__name__}:wrong", only_successes=True, episodes=3)
    said = r"0 of 69 episodes were kept, 13 were lost .*, and 3 are asked for; mend the policy"
    with pytest.raises(UserError, match=said):
        collect(config, tmp_path / "data", quiet=True)


def test_where_all_episodes_are_lost_the_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST_ATTEMPTS", 1)
    BEGUN.clear()
    LOST.clear()
    config = replace(CONFIG, env="collect/Leaves-v0", policy=f"{__name__}:hop", episodes=3)
    with pytest.raises(UserError, match=r"0 of 69 episodes were kept, 69 were lost .*; mend the environment collect/L"):
        collect(config, tmp_path / "data", quiet=True)
    first, tenth = capsys.readouterr().err.splitlines()
    assert "the observation is 7.0 at [0]" in first
    assert "wider bounds" in first
    assert "10 of 10 by now" in tenth


def test_each_part_is_read_once_while_playing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    once = module._read_part
    monkeypatch.setattr(module, "_read_part", lambda path: (read.append(path.name), once(path))[1])
    monkeypatch.setattr(module, "MOST_ATTEMPTS", 1)
    config = replace(CONFIG, policy=f"{__name__}:wrong", only_successes=True, episodes=1)
    with pytest.raises(UserError, match="episodes were kept"):
        collect(config, tmp_path / "data", quiet=True)
    assert len(read) == len(set(read)) > 60


@pytest.mark.parametrize(("old", "new"), [('"lost": ', '"lost": 1'), ("[1.0", "[0.0"), ('"returns"', '"return"')])
def test_a_part_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    monkeypatch.setattr(module, "_join", lambda config, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(CONFIG, tmp_path / "data", quiet=True)
    path = tmp_path / "data" / "parts" / "part-00001.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"part-00001\.json is not what was written"):
        collect(CONFIG, tmp_path / "data", resume=True, quiet=True)


def test_an_interrupted_collection_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(CONFIG, tmp_path / "whole", quiet=True)
    play_part, played = module._play_part, []

    def interrupted(*arguments: Any) -> None:
        if len(played) == 1:
            raise KeyboardInterrupt
        played.append(arguments[-1])
        play_part(*arguments)

    monkeypatch.setattr(module, "_play_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(CONFIG, tmp_path / "data", quiet=True)
    monkeypatch.setattr(module, "_play_part", lambda *arguments: (played.append(arguments[-1]), play_part(*arguments)))
    with pytest.raises(UserError, match="add --resume"):
        collect(CONFIG, tmp_path / "data", quiet=True)
    with pytest.raises(UserError, match="was started with other options"):
        collect(replace(CONFIG, seed=1), tmp_path / "data", resume=True, quiet=True)
    assert collect(CONFIG, tmp_path / "data", resume=True, quiet=True) == whole
    assert [part.start for part in played] == [0, 45, 90]
    one, other = (TrajectoryStore(tmp_path / name).read(np.arange(90)) for name in ("whole", "data"))
    assert torch.equal(one.states, other.states)
    assert collect(CONFIG, tmp_path / "data", resume=True, quiet=True) == whole  # finished: nothing is played
    assert len(played) == 3


def test_what_a_quicker_worker_played_besides_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(CONFIG, tmp_path / "whole", quiet=True)
    needed, join = 3, module._join

    def one_more(config: CollectConfig, out: Path) -> None:
        env = module.Guard(module.GuardedEnvironment(config.env))
        attempts = range(45 * needed, 45 * (needed + 1))
        module._play_part(config, env, small_or_wrong, module._part(out, needed), attempts)
        join(config, out)

    monkeypatch.setattr(module, "_join", one_more)
    assert collect(CONFIG, tmp_path / "data", quiet=True) == whole
    assert (tmp_path / "data/store.json").read_bytes() == (tmp_path / "whole/store.json").read_bytes()


def test_parts_that_a_kill_left_beside_the_whole_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(CONFIG, tmp_path / "whole", quiet=True)
    join = module._join
    with monkeypatch.context() as patch:
        patch.setattr(module, "_join", lambda *arguments: (join(*arguments), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            collect(CONFIG, tmp_path / "data", quiet=True)
    assert (tmp_path / "data/parts").exists()
    assert collect(CONFIG, tmp_path / "data", resume=True, quiet=True) == whole
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("data", "whole")]
    assert names[0] == names[1]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_worker_processes_play_the_same_episodes(tmp_path: Path) -> None:
    config = CollectConfig(env="CartPole-v1", policy=f"{__name__}:at_random", episodes=80)
    stores = []
    for workers in (1, 2):
        collect(config, tmp_path / str(workers), workers=workers, quiet=True)
        stores.append(TrajectoryStore(tmp_path / str(workers)).read(np.arange(80)))
    assert torch.equal(stores[0].states, stores[1].states)
    assert torch.equal(stores[0].lengths, stores[1].lengths)


def at_random(observation: Any, env: Any) -> Any:
    return env.np_random.integers(2)


def test_what_broke_before_an_episode_was_kept_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="broken' raised TypeError: unsupported operand"):
        collect(replace(CONFIG, policy=f"{__name__}:broken"), tmp_path / "data", quiet=True)
    assert collect(CONFIG, tmp_path / "data", quiet=True)["kept"] == 90


def broken(observation: Any, env: Any) -> Any:
    return observation + None


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    collect(replace(CONFIG, episodes=3), tmp_path / "link", quiet=True)
    assert len(TrajectoryStore(tmp_path / "large")) == 3


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files of something else"):
        collect(CONFIG, tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("env", "answers", "said"),
    [
        ("Guess", [1.5], r"is 1.5; expected one of Discrete\(5\)"),
        ("Guess", [2, 5], r"is 5; expected one of Discrete\(5\)"),
        ("Guess", [None], r"is None; expected one of Discrete\(5\)"),
        ("Guess", [[1, 2]], r"has the shape \(2,\); expected \(\)"),
        ("Push", [[0, 0], [0.5, np.nan]], r"is nan at \[1\]; expected one of Box"),
        ("Push", [[0.5, 1.0001]], r"is 1.0001 at \[1\]; expected one of Box"),
        ("Push", [[0.5]], r"has the shape \(1,\); expected \(2,\)"),
        ("Push", ["left"], "is 'left'; expected one of Box"),
    ],
)
def test_a_wrong_action_of_a_policy_is_named_at_once(tmp_path: Path, env: str, answers: list[Any], said: str) -> None:
    ANSWERS[:] = answers
    config = CollectConfig(env=f"collect/{env}-v0", policy=f"{__name__}:answering", episodes=2)
    with pytest.raises(UserError, match=f"an action of policy '{__name__}:answering' {said}.*; mend the policy"):
        collect(config, tmp_path / "data", quiet=True)
    assert not list((tmp_path / "data").glob("parts/*"))


@pytest.mark.parametrize("answer", [3, 3.0, np.array(3), np.array([3]), [3], np.uint8(3)])
def test_one_whole_number_is_an_action_of_a_choice(tmp_path: Path, answer: Any) -> None:
    ANSWERS[:] = [answer]
    config = CollectConfig(env="collect/Guess-v0", policy=f"{__name__}:answering", episodes=2)
    collect(config, tmp_path / "data", quiet=True)
    actions = TrajectoryStore(tmp_path / "data").arrays["actions"]
    assert (actions.tolist(), actions.shape, actions.dtype) == ([3, 3], (2,), np.int64)


def test_whole_numbers_early_and_floats_later_are_one_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", 1)
    ANSWERS[:] = [[0, 1]] * 4 + [[0.5, 0.1]]
    config = CollectConfig(env="collect/Push-v0", policy=f"{__name__}:answering", episodes=2)
    collect(config, tmp_path / "data", quiet=True)
    arrays = TrajectoryStore(tmp_path / "data").arrays
    expected = np.array([[0, 1]] * 4 + [[0.5, 0.1]] * 4, np.float32)
    for name, values in {"actions": expected, "states": arrays["states"]}.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], values)
    np.testing.assert_array_equal(arrays["states"][1:5], expected[:4])


def test_a_world_without_a_time_limit_is_said_and_given_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_STEPS", 5)
    ANSWERS[:] = [[0, 0]]
    config = CollectConfig(env="collect/Endless-v0", policy=f"{__name__}:answering", episodes=2)
    assert collect(config, tmp_path / "five")["steps"] == 10
    said = "collect/Endless-v0 has no time limit: an episode may take 5 steps; --max-steps sets another"
    assert said in capsys.readouterr().err
    assert collect(replace(config, max_steps=3), tmp_path / "three")["steps"] == 6
    assert "time limit" not in capsys.readouterr().err
    truncated = TrajectoryStore(tmp_path / "three").arrays["truncated"]
    assert truncated.tolist() == [True, True]


def test_the_same_seed_gives_the_same_episodes_after_an_exception_too(tmp_path: Path) -> None:
    config = CollectConfig(env="collect/Falling-v0", policy=f"{__name__}:sampling", episodes=40)
    lost = [collect(config, tmp_path / name, quiet=True)["lost"] for name in ("one", "other")]
    assert lost[0] == lost[1] > 0
    one, other = (TrajectoryStore(tmp_path / name).arrays for name in ("one", "other"))
    np.testing.assert_array_equal(one["actions"], other["actions"])
    np.testing.assert_array_equal(one["states"], other["states"])
