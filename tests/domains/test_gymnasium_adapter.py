"""Gymnasium environments as batches: endings, success, actions, time limits, exceptions, worker processes."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from metacontroller import MetaController, Transformer
from metacontroller.domains import guarded_environment
from metacontroller.domains.base import BatchedEnv
from metacontroller.domains.guarded_environment import BEGUN, FEW, LOST, environment_facts, tell_doubtful_success
from metacontroller.domains.gymnasium_adapter import GymnasiumBatch, GymnasiumEnvironments
from metacontroller.errors import UserError
from metacontroller.phases.internal_rl import internal_rl
from metacontroller.phases.policy_gradient import InternalRLConfig
from metacontroller.storage.run_folder import RunFolder


class Walk(gymnasium.Env):
    """From 0 by actions 5, 6, 7 (steps of -1, 0, 1); 3 ends it with reward 1, and -3 with an exception."""

    def __init__(self, tells: bool = False) -> None:
        self.tells = tells
        self.observation_space = spaces.Discrete(7, start=-3)
        self.action_space = spaces.Discrete(3, start=5)
        self.broken = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert not self.broken, "an environment that raised was used again"
        self.place = 0
        return self.place, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.place != 3, "an environment that had ended was stepped"
        self.place += int(action) - 6
        if self.place == -3:
            self.broken = True
            raise ValueError("fell off")
        done = self.place == 3
        return self.place, float(done), done, False, {"is_success": self.place == 2} if self.tells else {}


class Push(gymnasium.Env):
    """Two forces within (0, 10) and (-1, 1); the return is their sum, and nothing ever ends."""

    observation_space = spaces.Dict({"x": spaces.Box(-np.inf, np.inf, (2,), np.float64), "text": spaces.Text(9)})
    action_space = spaces.Box(np.array([0, -1], np.float32), np.array([10, 1], np.float32))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return {"x": self.np_random.normal(size=2), "text": "push"}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        return {"x": np.asarray(action, np.float64), "text": "push"}, float(action.sum()), False, False, {}


class Odd(gymnasium.Env):
    """Ends after four steps; its third step returns what it is told to, in place of an observation or a reward."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, observation: Any = (0.5, 0.25), reward: Any = 0.25, *, first: Any = (0.0, 0.0)) -> None:
        self.given, self.first = (observation, reward), first

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return self.first, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        observation, reward = self.given if self.steps == 3 else (np.full(2, self.steps / 10), 1.0)
        if isinstance(observation, str):
            sys.exit(3)
        return observation, reward, self.steps == 4, False, {}


class Narrow(gymnasium.Env):
    """Each environment has bounds of its own, of observations and of actions; it shows the force that it took."""

    made = 0

    def __init__(self) -> None:
        Narrow.made += 1
        self.action_space = spaces.Box(-1.0 / Narrow.made, 1.0, (1,))
        self.observation_space = spaces.Box(-1.0 / Narrow.made, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return action, 0.0, False, False, {}


class Changing(Narrow):
    """Each environment has one action more than the last."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(Narrow.made)


class Old(Odd):
    """Returns from ``reset`` what environments of Gym did."""

    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0]


class Older(Odd):
    """Its ``reset`` takes no seed."""

    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()


gymnasium.register("adapter/Old-v0", Old)  # type: ignore[arg-type]
gymnasium.register("adapter/Older-v0", Older)  # type: ignore[arg-type]
gymnasium.register("adapter/Narrow-v0", Narrow)  # type: ignore[arg-type]
gymnasium.register("adapter/Changing-v0", Changing)  # type: ignore[arg-type]
gymnasium.register("adapter/Walk-v0", Walk)  # type: ignore[arg-type]
gymnasium.register("adapter/TellingWalk-v0", Walk, kwargs={"tells": True})  # type: ignore[arg-type]
gymnasium.register("adapter/Push-v0", Push)  # type: ignore[arg-type]


def batch_of(name: str, n: int, max_steps: int = 100, **options: Any) -> GymnasiumBatch:
    return GymnasiumEnvironments(name, **options).reset(n, torch.Generator().manual_seed(0), max_steps)


def play(batch: GymnasiumBatch, *columns: list[Any]) -> torch.Tensor:
    """Takes one action after the other in every row; the rewards (b, t)."""
    return torch.stack([batch.step(torch.tensor(actions)) for actions in zip(*columns, strict=True)], 1)


def test_rows_end_by_themselves_and_then_ignore_actions() -> None:
    batch = batch_of("adapter/Walk-v0", 2)
    assert isinstance(batch, BatchedEnv)
    assert batch.observation.tolist() == [[3], [3]]  # counted from 0
    rewards = play(batch, [2, 2, 2, 0, 0], [1, 1, 1, 2, 2])
    assert rewards.tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.observation.tolist() == [[6], [5]]
    assert batch.steps.tolist() == [3, 5]
    assert batch.terminated.tolist() == batch.success.tolist() == [True, False]
    assert batch.truncated.tolist() == batch.lost.tolist() == [False, False]
    assert batch.goal().tolist() == batch.reached().tolist() == [-1, -1]


def test_an_exception_costs_its_episode_alone(capsys: pytest.CaptureFixture) -> None:
    LOST.clear()
    environments, generator = GymnasiumEnvironments("adapter/Walk-v0"), torch.Generator().manual_seed(0)
    batch = environments.reset(2, generator, 100)
    rewards = play(batch, [0, 0, 0, 2, 2], [2, 2, 2, 2, 2])
    assert rewards.sum(1).tolist() == [0, 1]
    assert (batch.truncated.tolist(), batch.lost.tolist(), batch.success.tolist()) == (
        [True, False],
        [True, False],
        [False, True],
    )
    assert "ValueError: fell off" in capsys.readouterr().err
    rows = batch.envs
    del batch
    again = environments.reset(2, generator, 100)
    assert again.envs is rows  # the same environments, but for the one that broke
    assert again.lost.tolist() == [False, False]


def test_exceptions_are_printed_more_rarely_as_they_go_on(capsys: pytest.CaptureFixture) -> None:
    LOST.clear()
    BEGUN.clear()
    for _ in range(12):
        play(batch_of("adapter/Walk-v0", 1), [0, 0, 0])
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("ends here and is lost, 1 of 1 by now.") for line in lines] == [True, False]
    assert lines[1].endswith("ends here and is lost, 10 of 10 by now.")


def test_a_reward_that_is_no_number_costs_its_episode() -> None:
    batch = batch_of("adapter/Push-v0", 2)
    rewards = play(batch, [[1.0, 0.5]] * 2, [[np.nan, 0.5], [1.0, 0.5]])
    assert rewards.tolist() == [[1.5, 1.5], [0.0, 0.0]]
    assert batch.lost.tolist() == [False, True]


def odd(name: str, **options: Any) -> str:
    """The ID of an odd environment, which is registered here."""
    gymnasium.register(f"adapter/Odd{name}-v0", Odd, kwargs=options)  # type: ignore[arg-type]
    return f"adapter/Odd{name}-v0"


@pytest.mark.parametrize(
    ("case", "options", "said"),
    [
        (0, {"reward": None}, "the reward is None; expected one finite number"),
        (1, {"reward": [1.0, 2.0]}, "the reward is [1.0, 2.0]; expected one finite number"),
        (2, {"reward": "1"}, "the reward is '1'; expected one finite number"),
        (3, {"reward": np.array([np.inf])}, "the reward is array([inf]); expected one finite number"),
        (4, {"observation": (np.nan, 0.0)}, "the observation is nan at [0]; expected one of Box"),
        (5, {"observation": (0.0, 1.5)}, "the observation is 1.5 at [1]; expected one of Box"),
        (6, {"observation": (0.0, 0.0, 0.0)}, "the observation has the shape (3,); expected (2,)"),
        (7, {"observation": None}, "the observation is None; expected one of Box"),
        (8, {"observation": "exit"}, "raised SystemExit: 3"),
        (9, {"observation": (-1.5, 0.0)}, "the observation is -1.5 at [0]; expected one of Box"),
    ],
)
def test_what_is_not_of_its_space_costs_its_episode_and_the_run_goes_on(
    case: int, options: dict[str, Any], said: str, capsys: pytest.CaptureFixture
) -> None:
    LOST.clear()
    environments, generator = GymnasiumEnvironments(odd(str(case), **options)), torch.Generator().manual_seed(0)
    batch = environments.reset(2, generator, 100)
    rewards = play(batch, [0, 0, 0, 0], [1, 1, 1, 1])
    assert rewards.tolist() == [[1, 1, 0, 0]] * 2
    assert batch.observation.tolist() == pytest.approx(np.full((2, 2), 0.2))  # the last one that was sound
    assert batch.lost.tolist() == batch.truncated.tolist() == [True, True]
    assert batch.steps.tolist() == [3, 3]
    assert said in capsys.readouterr().err
    del batch
    assert environments.reset(2, generator, 100).lost.tolist() == [False, False]


@pytest.mark.parametrize(
    "reward", [0.25, np.array(0.25), np.array([0.25]), [0.25], np.float32(0.25), torch.tensor(0.25)]
)
def test_a_reward_of_one_entry_is_taken_and_observations_are_cast(reward: Any) -> None:
    name = odd(f"Cast{type(reward).__name__}{np.ndim(reward)}", observation=[0.5, -1], reward=reward)
    batch = batch_of(name, 1)
    assert play(batch, [0, 0, 0, 0]).tolist() == [[1, 1, 0.25, 1]]
    assert batch.lost.tolist() == [False]
    assert batch.observation.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter/Old-v0", r"reset returned \(0.0, 0.0\); expected an observation and an info"),
        ("adapter/Older-v0", "TypeError: .* unexpected keyword argument 'seed'"),
        (odd("First", first=(0.0, 3.0)), r"the observation is 3.0 at \[1\]; expected one of Box"),
        (odd("None", first=None), "the observation is None; expected one of Box"),
    ],
)
def test_an_environment_whose_first_reset_fails_is_refused_when_it_is_named(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^env '{name}' cannot be reset: {said}"):
        environment_facts(name)


def test_environments_may_have_bounds_of_their_own() -> None:
    environment_facts.cache_clear()
    Narrow.made = 0
    batch = batch_of("adapter/Narrow-v0", 4)
    play(batch, *[[[-9.0]]] * 4)
    assert batch.lost.tolist() == [False] * 4
    assert batch.observation.flatten().tolist() == pytest.approx([-1 / made for made in (2, 3, 4, 5)])
    maker = pickle.loads(pickle.dumps(batch.envs.envs.envs[0].maker))  # noqa: S301
    environment_facts.cache_clear()
    assert maker.facts.action_space.low == -1  # as worker processes see it, whatever bounds their first one has


def test_environments_of_one_id_with_other_actions_each_time_are_refused() -> None:
    environment_facts.cache_clear()
    Narrow.made = 1
    said = r"env 'adapter/Changing-v0' has the space Discrete\(3\) where it had Discrete\(2\) when it was first made"
    with pytest.raises(UserError, match=said):
        batch_of("adapter/Changing-v0", 2)


def test_a_time_limit_truncates() -> None:
    batch = batch_of("adapter/Walk-v0", 1, max_steps=2)
    play(batch, [1, 1, 2])
    assert (batch.steps.tolist(), batch.truncated.tolist(), batch.observation.tolist()) == ([2], [True], [[3]])


def test_success_is_what_the_info_says_or_a_rule() -> None:
    told = batch_of("adapter/TellingWalk-v0", 2)
    play(told, [2, 2, 1], [2, 2, 2])
    assert told.success.tolist() == [True, False]  # in the last info
    ruled = batch_of("adapter/Push-v0", 2, max_steps=2, success_return=3.0)
    play(ruled, [[1.0, 0.0]] * 2, [[2.0, 0.0]] * 2)
    assert ruled.success.tolist() == [False, True]


def test_success_where_ending_is_failure_is_doubted(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pole that falls is paid as one that stands; one that is held for longer is worth more."""
    monkeypatch.setattr(guarded_environment, "_DOUBTED", set())  # other tests play this world too
    monkeypatch.setattr(guarded_environment, "_ENDED", defaultdict(lambda: np.zeros((2, 4))))
    batch = batch_of("CartPole-v1", FEW)
    while not batch.terminated.all():
        batch.step(torch.zeros(FEW, dtype=torch.int64))
    said = capsys.readouterr().err
    assert batch.success.all()
    assert "CartPole-v1 may end where an episode fails: one that counts as solved has 9" in said
    assert "its last step pays no more. State the return that counts as success: --success-return of collect" in said
    again = batch_of("CartPole-v1", FEW, success_return=400.0)
    while not again.terminated.all():
        again.step(torch.zeros(FEW, dtype=torch.int64))
    assert (again.success.any().item(), capsys.readouterr().err) == (False, "")  # as the option makes it


@pytest.mark.parametrize(
    ("solved", "others", "doubted"),
    [
        ((20, 30.0, 3.0), (50, 60.0), True),  # falls with a bonus, and is worth less than what stands
        ((20, 1.0, 1.0), (50, 0.0), False),  # a goal that is paid
        ((20, 0.6, 0.6), (5, 0.0), False),  # others end early, in a hole
        ((20, -19.0, 1.0), (50, -50.0), False),  # each step costs something
        ((1, 1.0, 1.0), (50, 0.0), False),  # one step alone is no comparison
        ((60, 70.0, 5.0), (50, 60.0), False),  # longer and worth more
    ],
)
def test_success_is_doubted_only_where_it_is_worth_less(
    solved: tuple[int, float, float], others: tuple[int, float], doubted: bool, capsys: pytest.CaptureFixture
) -> None:
    name = f"adapter/Doubt{solved}{others}"
    for _ in range(FEW):
        tell_doubtful_success(name, True, *solved)
        tell_doubtful_success(name, False, *others, 0.0)
    assert ("may end where an episode fails" in capsys.readouterr().err) == doubted


def test_boxes_are_clipped_and_text_is_dropped() -> None:
    batch = batch_of("adapter/Push-v0", 1)
    assert (batch.observation.shape, batch.observation.dtype) == ((1, 2), torch.float32)
    assert play(batch, [[-5.0, 7.0]]).item() == 1.0
    assert batch.observation.tolist() == [[0.0, 1.0]]


def test_rows_are_selected_in_any_order() -> None:
    batch = batch_of("adapter/Walk-v0", 4)
    batch.select(torch.tensor([1, 2, 3]))
    play(batch, [0], [1], [2])
    batch.select(torch.tensor([2, 0]))
    assert (len(batch), batch.observation.tolist()) == (2, [[4], [2]])
    batch.step(torch.tensor([2, 1]))
    assert batch.observation.tolist() == [[5], [2]]


def test_some_rows_step_while_others_hold_still_and_some_begin_again() -> None:
    batch, generator = batch_of("adapter/Walk-v0", 3), torch.Generator().manual_seed(1)
    taken = copy.copy(batch)
    taken.select(torch.tensor([0, 2]))
    play(taken, [2, 2, 2], [0, 0, 1])
    assert batch.observation.tolist() == [[3], [3], [3]]
    with pytest.raises(UserError, match="cannot go to another row"):
        batch.replace(torch.tensor([0, 1]), taken)
    batch.replace(torch.tensor([0, 2]), taken)
    assert (batch.observation.tolist(), batch.steps.tolist()) == ([[6], [3], [1]], [3, 0, 3])
    assert batch.success.tolist() == batch.terminated.tolist() == [True, False, False]
    batch.begin_again(torch.tensor([0]), generator)
    assert (batch.observation.tolist(), batch.steps.tolist()) == ([[3], [3], [1]], [0, 0, 3])
    assert not batch.terminated.any()
    play(batch, [2], [1], [2])
    assert (batch.observation.tolist(), batch.steps.tolist()) == ([[4], [3], [2]], [1, 1, 4])


def test_worker_processes_change_nothing() -> None:
    generator = torch.Generator()
    runs = []
    for workers in (0, 2):
        batch = GymnasiumEnvironments("Pendulum-v1", workers=workers).reset(3, generator.manual_seed(5), 4)
        rewards = torch.stack([batch.step(torch.full((3, 1), force)) for force in (0.5, -9.0, 1.0, 2.0, 1.0)])
        runs.append((rewards, batch.observation, batch.truncated))
        for rows in ([1], [0, 2], [0, 1, 2]):  # in both processes, or in one of them
            first = batch.observation
            batch.begin_again(torch.tensor(rows), generator)
            kept = sorted({0, 1, 2} - set(rows))
            assert torch.equal(first[kept], batch.observation[kept])
            assert not torch.equal(first[rows], batch.observation[rows])
            runs[-1] += (batch.observation, batch.step(torch.full((3, 1), -1.0)), batch.steps, batch.truncated)
    assert len({tuple(row) for row in runs[0][1].tolist()}) == 3  # each row has a seed of its own
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_internal_rl_plays_in_worker_processes_and_ends_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transformer(
        16,
        action_embed_readout={"num_continuous": 1},
        state_embed_readout={"num_continuous": 3},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    )
    steering = MetaController(16, dim_meta_controller=8, dim_latent=2, rank=2)
    before = set(multiprocessing.active_children())
    logs = []
    for workers in (0, 2):
        environments = GymnasiumEnvironments("Pendulum-v1", workers=workers)
        run = RunFolder(tmp_path / str(workers))
        settings = InternalRLConfig(episodes=12, batch_size=6, lr=1e-3)
        internal_rl(
            settings,
            copy.deepcopy(model),
            copy.deepcopy(steering),
            partial(environments.reset, max_steps=5),
            run,
            quiet=True,
        )
        logs.append([line["return"] for line in run.read_metrics("internal_rl")])
        assert len(set(multiprocessing.active_children()) - before) == workers
        if workers:
            (rows,) = environments.free[6]
            killed = next(iter(set(multiprocessing.active_children()) - before))
            killed.kill()
            killed.join()
            with pytest.raises(UserError, match=r"has ended, killed or crashed .* resume with --resume"):
                rows.reset(0, 5)
            with pytest.raises(UserError, match=r"cannot be pickled or copied; set domain\.workers to 0"):
                copy.deepcopy(rows)
            del rows
        del environments
        gc.collect()
        assert set(multiprocessing.active_children()) == before
    assert logs[0] == pytest.approx(logs[1])
    assert len(set(logs[0])) == 2


def test_one_environment_alone_needs_no_process() -> None:
    assert batch_of("adapter/Walk-v0", 1, workers=3).envs.workers == 0


def test_what_an_environment_says_of_itself() -> None:
    facts = environment_facts("CartPole-v1")
    assert (facts.observation_space.shape, facts.action_space, facts.max_steps) == ((4,), spaces.Discrete(2), 500)


def test_a_package_that_registers_when_imported_is_found() -> None:
    pytest.importorskip("minigrid", reason="needs the extra babyai")
    assert environment_facts("MiniGrid-Empty-5x5-v0").max_steps == 100


@pytest.mark.parametrize("name", ["Nothing-v0", "json:Nothing-v0", "CartPole-v99"])
def test_an_unknown_environment_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"env '{name}' is no environment"):
        environment_facts(name)


def test_a_module_of_an_environment_is_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = 'gymnasium.register("Near-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=7)'
    (tmp_path / "near_module.py").write_text(f"import gymnasium\n{spec}\n")
    assert environment_facts("near_module:Near-v0").max_steps == 7
    with pytest.raises(UserError, match="env 'far_module:Near-v0' names no module that can be imported; write module:"):
        environment_facts("far_module:Near-v0")
