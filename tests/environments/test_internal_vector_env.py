"""Internal RL as a vector environment: rows equal `InternalEnv` and the rollout; autoreset, seeds, prior."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch import Tensor

from metacontroller import InternalEnv, InternalVectorEnv, MetaController, Transformer
from metacontroller.domains.base import Domain
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.domains.pinpad.layouts import Layouts
from metacontroller.domains.pinpad.tasks import pad_tasks
from metacontroller.phases.evaluate import evaluate
from metacontroller.phases.rollout import rollout_abstract

CODE, ROWS = 3, 4
CONFIG = GridworldPinpadConfig(
    size=4, num_colors=2, num_walls=1, max_steps=14, tasks=((0, 1), (1, 0)), post_task=(0, 1, 0), colors_per_subgoal=1
)
BODIES: dict[str, dict[str, Any]] = {"attention": {"heads": 2}, "hawk": {"kind": "hawk", "heads": 2}}


class NotedWorld(GridworldPinpad):
    """Keeps the first observations of the episodes it starts."""

    def __init__(self, config: GridworldPinpadConfig = CONFIG) -> None:
        super().__init__(config)
        self.started: list[Tensor] = []

    def reset(self, n: int, generator: torch.Generator, **options: Any) -> PinpadBatch:
        env = super().reset(n, generator, **options)
        self.started.append(env.observation)
        return env


class OneByOne:
    """A batch of grids without ``replace``, so that it is played row by row."""

    def __init__(self, grids: PinpadBatch) -> None:
        self.grids = grids

    def __len__(self) -> int:
        return len(self.grids)

    def __getattr__(self, name: str) -> Any:
        if name in ("replace", "grids"):
            raise AttributeError(name)
        return getattr(self.grids, name)


class OneByOneWorld(NotedWorld):
    def reset(self, n: int, generator: torch.Generator, **options: Any) -> OneByOne:  # pyright: ignore
        return OneByOne(super().reset(n, generator, **options))


class OneGrid(gymnasium.Env[Tensor, np.int64]):
    """Episodes that begin with given observations, one after the other; shows the model's own states."""

    def __init__(self, starts: list[Tensor]) -> None:
        self.starts = starts
        self.action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Tensor, dict[str, Any]]:
        super().reset(seed=seed)
        self.grid = GridworldPinpad(CONFIG).reset(1, torch.Generator())
        start = self.starts.pop(0)
        self.grid.replace(torch.tensor([0]), placed(start))
        return start, {}

    def step(self, action: np.int64) -> tuple[Tensor, float, bool, bool, dict[str, Any]]:
        reward = float(self.grid.step(torch.tensor([int(action)])))
        return self.grid.observation[0], reward, bool(self.grid.terminated), bool(self.grid.truncated), {}


def placed(start: Tensor) -> PinpadBatch:
    """One grid of the post-training task that begins with this observation."""
    tasks, lengths = pad_tasks([CONFIG.post_task])
    layouts = Layouts(start[None, :-1], start[None, -1])
    return PinpadBatch(CONFIG.grid, layouts, tasks, lengths, subgoals=CONFIG.subgoals)


def make_model(gate: Any = None, **options: Any) -> tuple[Transformer, MetaController]:
    """Random model and metacontroller, with a gate that opens now and then and codes that matter."""
    defaults: dict[str, Any] = {
        "action_embed_readout": {"num_discrete": 4},
        "state_embed_readout": {"grid": {"size": 4, "num_colors": 2, "num_walls": 1}},
        "lower_body": {"depth": 2, "heads": 2},
        "upper_body": {"depth": 1, "heads": 2},
    }
    model = Transformer(8, **(defaults | options))
    steering = MetaController(8, dim_meta_controller=8, dim_latent=CODE, rank=2, gate=gate)
    for weight in (steering.controller.write, steering.switching.out.weight, steering.switching.code.weight):
        torch.nn.init.normal_(weight, std=2.0)
    return model.eval(), steering.eval()


@pytest.mark.parametrize(
    ("world", "body", "gate"),
    [
        (NotedWorld, "attention", None),
        (NotedWorld, "attention", {"mode": "fixed-frequency", "period": 3}),
        (OneByOneWorld, "hawk", None),
    ],
)
def test_every_row_equals_an_internal_env_with_the_same_episodes_and_codes(
    world: type[NotedWorld], body: str, gate: Any
) -> None:
    model, steering = make_model(
        gate,
        lower_body={"depth": 2, **BODIES[body]},
        upper_body={"depth": 1, **BODIES[body]},
        condition_on_actions=True,
    )
    steering.action_temperature = 0.0
    domain = world()
    envs = InternalVectorEnv(domain, model, steering, ROWS)
    codes = np.random.default_rng(0).normal(size=(14, ROWS, CODE)).astype(np.float32)
    first = envs.reset(seed=0)
    results = []
    starts: list[list[Tensor]] = [[] for _ in range(ROWS)]
    for code in codes:
        results.append(envs.step(code))
    # the first observations, in the order in which rows asked for them
    if world is OneByOneWorld:
        domain.started = joined_single_starts(domain.started, results)
    fresh = iter(domain.started)
    for row, start in enumerate(next(fresh)):
        starts[row].append(start)
    for _, _, terminated, truncated, _ in results:
        ended = (terminated | truncated).nonzero()[0]
        if len(ended):
            for row, start in zip(ended, next(fresh), strict=True):
                starts[row].append(start)
    assert next(fresh, None) is None

    def one(row: int) -> Any:
        return lambda: InternalEnv(OneGrid(starts[row]), model, steering, encode_observation=lambda seen: seen)

    singles = SyncVectorEnv([one(row) for row in range(ROWS)], autoreset_mode=AutoresetMode.SAME_STEP)
    np.testing.assert_allclose(first[0], singles.reset(seed=0)[0], rtol=1e-4, atol=1e-5)
    lengths, endings = [], 0
    for code, (observation, rewards, terminated, truncated, info) in zip(codes, results, strict=True):
        expected = singles.step(code)
        np.testing.assert_allclose(observation, expected[0], rtol=1e-4, atol=1e-5)
        for found, other in zip((rewards, terminated, truncated), expected[1:4], strict=True):
            np.testing.assert_array_equal(found, other)
        np.testing.assert_array_equal(info["steps"], expected[4]["steps"])
        np.testing.assert_array_equal(info["_steps"], expected[4]["_steps"])
        assert ("final_obs" in info) == ("final_obs" in expected[4]) == bool((terminated | truncated).any())
        if "final_obs" in info:
            ended = terminated | truncated
            for name in ("_final_obs", "_final_info"):
                np.testing.assert_array_equal(info[name], expected[4][name])
            steps = info["final_info"]["steps"]
            np.testing.assert_array_equal(steps[ended], expected[4]["final_info"]["steps"][ended])
            np.testing.assert_array_equal(info["final_info"]["success"][ended], rewards[ended] == 1)
            for row in range(ROWS):
                if ended[row]:
                    last = expected[4]["final_obs"][row]
                    np.testing.assert_allclose(info["final_obs"][row], last, rtol=1e-4, atol=1e-5)
                else:
                    assert info["final_obs"][row] is None
            endings += int(ended.sum())
            lengths += info["final_info"]["episode_steps"][ended].tolist()
    assert endings > ROWS
    assert len(set(lengths)) > 3


def joined_single_starts(started: list[Tensor], results: Any) -> list[Tensor]:
    """What a row-by-row world started, without the batch it was first asked for, joined by step."""
    counts = [ROWS, *(int((terminated | truncated).sum()) for _, _, terminated, truncated, _ in results)]
    starts, joined = started[1:], []
    for count in filter(None, counts):
        joined.append(torch.cat(starts[:count]))
        starts = starts[count:]
    assert not starts
    return joined


@pytest.mark.parametrize("mode", ["soft", "gumbel-sigmoid", "forced", "fixed-frequency"])
def test_a_policy_plays_as_in_the_rollout_of_the_phase(mode: str) -> None:
    model, steering = make_model({"mode": mode, "period": 3})
    torch.nn.init.normal_(steering.policy.readout.weight, std=0.5)
    steering.action_temperature = 0.0
    envs = InternalVectorEnv(GridworldPinpad(CONFIG), model, steering, 64, task=(0, 1))

    def mean(residual: Tensor, state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distribution, advanced = steering.policy(residual[:, None], state)
        return distribution[:, 0, :CODE].clamp(-5, 5), residual.new_zeros(len(rows)), advanced

    seed = int(np_random(3)[0].integers(2**62))  # that of the first episodes
    env = envs.domain.reset(64, torch.Generator().manual_seed(seed), task=(0, 1))
    rollout = rollout_abstract(model, steering, env, mean)

    residual, _ = envs.reset(seed=3)
    state = steering.policy.initial_state(64)
    first = {name: np.zeros(64) for name in ("success", "episode_steps", "subgoals_done", "decisions")}
    running, decisions = np.ones(64, bool), 0
    with torch.no_grad():
        while running.any():
            code, _, state = mean(torch.from_numpy(residual), state, torch.arange(64))
            residual, _, terminated, truncated, info = envs.step(code.numpy())
            decisions += 1
            over = running & (terminated | truncated)
            for name in ("success", "episode_steps", "subgoals_done"):
                if over.any():
                    first[name][over] = info["final_info"][name][over]
            first["decisions"][over] = decisions
            running &= ~over
    expected = (rollout.success, rollout.steps, rollout.subgoals_done, rollout.lengths)
    for found, other in zip(first.values(), expected, strict=True):
        np.testing.assert_array_equal(found, other.numpy())
    assert 0 < first["success"].mean() < 1
    assert first["decisions"].max() > 1


def test_prior_codes_succeed_as_often_as_evaluate_says() -> None:
    model, steering = make_model()
    domain = GridworldPinpad(CONFIG)
    for warped in (False, True):
        envs = InternalVectorEnv(domain, model, steering, 512, task=(0, 1), warped=warped)
        envs.reset(seed=0)
        success, running = np.zeros(512), np.ones(512, bool)
        while running.any():
            _, _, terminated, truncated, info = envs.step(envs.sample_prior())
            over = running & (terminated | truncated)
            if over.any():
                success[over] = info["final_info"]["success"][over]
            running &= ~over
        expected = evaluate(model, steering, domain, "prior", (0, 1), 512, 1)
        error = np.hypot(expected["success_se"], success.std() / 512**0.5)
        assert abs(success.mean() - expected["success"]) < 4 * error
        assert expected["success"] > 0.02


def test_spaces_and_the_mode_of_autoreset_are_declared() -> None:
    envs = InternalVectorEnv(GridworldPinpad(CONFIG), *make_model(), ROWS)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert envs.single_action_space == spaces.Box(-5.0, 5.0, (CODE,), np.float32)
    assert envs.action_space.shape == (ROWS, CODE)
    observation, info = envs.reset(seed=0)
    assert envs.observation_space.contains(observation)
    assert info["steps"].tolist() == [0] * ROWS
    observation, rewards, *_ = envs.step(envs.action_space.sample())
    assert envs.observation_space.contains(observation)
    assert rewards.dtype == np.float32


def test_gymnasiums_wrappers_count_its_episodes() -> None:
    envs = RecordEpisodeStatistics(InternalVectorEnv(GridworldPinpad(CONFIG), *make_model({"mode": "forced"}), ROWS))
    envs.reset(seed=0)
    for _ in range(20):
        *_, terminated, truncated, info = envs.step(np.zeros((ROWS, CODE), np.float32))
        ended = terminated | truncated
        if ended.any():
            assert info["episode"]["l"][ended].tolist() == info["final_info"]["episode_steps"][ended].tolist()
    assert envs.episode_count > ROWS


def test_seeds_settle_everything_and_the_copy_of_a_pickle_goes_on_alike() -> None:
    envs = InternalVectorEnv(GridworldPinpad(CONFIG), *make_model(), ROWS, warped=True)

    def play(envs: InternalVectorEnv, steps: int) -> list[Any]:
        return [envs.step(envs.sample_prior())[:4] for _ in range(steps)]

    def equal(one: list[Any], other: list[Any]) -> bool:
        return all(np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))

    envs.reset(seed=1)
    first = play(envs, 6)
    copied = pickle.loads(pickle.dumps(envs))  # noqa: S301
    assert equal(play(envs, 12), play(copied, 12))
    envs.reset(seed=1)
    assert equal(play(envs, 6), first)
    envs.reset(seed=2)
    assert not equal(play(envs, 6), first)


def test_what_was_returned_does_not_change_later() -> None:
    envs = InternalVectorEnv(GridworldPinpad(CONFIG), *make_model(), ROWS)
    envs.reset(seed=0)
    results = [envs.step(envs.sample_prior()) for _ in range(2)]
    kept = [[np.copy(value) for value in result[:4]] for result in results]
    for _ in range(5):
        envs.step(envs.sample_prior())
    for result, copies in zip(results, kept, strict=True):
        for value, copied in zip(result[:4], copies, strict=True):
            np.testing.assert_array_equal(value, copied)


def test_the_warp_makes_a_uniform_action_a_sample_of_the_prior() -> None:
    envs = InternalVectorEnv(GridworldPinpad(CONFIG), *make_model(), 2000, warped=True)
    assert envs.single_action_space == spaces.Box(-1.0, 1.0, (CODE,), np.float32)
    envs.action_space.seed(0)
    envs.reset(seed=0)
    for actions in (envs.action_space.sample(), envs.sample_prior()):
        codes = envs.codes(actions).flatten().sort().values
        quantiles = torch.distributions.Normal(0.0, 1.0).cdf(codes)
        assert float((quantiles - torch.linspace(0, 1, len(codes))).abs().max()) < 1.7 / len(codes) ** 0.5
    ends = np.zeros((2000, CODE), np.float32)
    ends[:3] = [[-1.0, 1.0, 0.0], [np.nextafter(np.float32(1), 0), -2.0, 2.0], [0.6826895, -0.6826895, 0.9544997]]
    expected = torch.tensor([[-5.0, 5.0, 0.0], [5.0, -5.0, 5.0], [1.0, -1.0, 2.0]])
    torch.testing.assert_close(envs.codes(ends)[1:3, 1:], expected[1:3, 1:], rtol=1e-4, atol=1e-4)
    assert envs.codes(ends)[0].tolist() == expected[0].tolist()
    plain = InternalVectorEnv(GridworldPinpad(CONFIG), *make_model(), 2000)
    plain.reset(seed=0)
    assert abs(float(plain.sample_prior().std()) - 1) < 0.05
    assert plain.codes(np.full((2000, CODE), 9.0)).unique().tolist() == [5.0]


def test_the_model_is_only_read() -> None:
    envs = InternalVectorEnv(GridworldPinpad(CONFIG), *make_model(), ROWS)
    parameters = [*envs.model.parameters(), *envs.meta_controller.parameters()]
    before = [value.clone() for value in parameters]
    envs.reset(seed=0)
    envs.step(envs.sample_prior())
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, parameters, strict=True))


@pytest.mark.parametrize("actions", [np.zeros((ROWS, CODE + 1)), np.zeros(CODE), np.full((ROWS, CODE), np.nan)])
def test_actions_that_are_no_codes_are_refused(actions: np.ndarray) -> None:
    envs = InternalVectorEnv(GridworldPinpad(CONFIG), *make_model(), ROWS)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected finite numbers of shape \(4, 3\)"):
        envs.step(actions)


def test_steps_before_a_reset_and_parts_that_do_not_fit_are_refused() -> None:
    model, steering = make_model()
    domain: Domain = GridworldPinpad(CONFIG)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        InternalVectorEnv(domain, model, steering, 2).step(np.zeros((2, CODE)))
    with pytest.raises(ValueError, match="num_envs is 0; expected at least 1"):
        InternalVectorEnv(domain, model, steering, 0)
    with pytest.raises(ValueError, match="dim_model 12; expected 8"):
        InternalVectorEnv(domain, model, MetaController(12, dim_meta_controller=8, dim_latent=2, rank=2))


@pytest.mark.parametrize("world", [GridworldPinpad, OneByOneWorld])
def test_reset_mask_begins_new_episodes_in_its_rows_alone(world: Any) -> None:
    model, steering = make_model()
    steering.action_temperature = 0.0
    envs = InternalVectorEnv(world(CONFIG) if world is GridworldPinpad else world(), model, steering, ROWS)
    with pytest.raises(ValueError, match="no episode has started; reset all rows first"):
        envs.reset(options={"reset_mask": np.ones(ROWS, bool)})
    codes = np.random.default_rng(0).normal(size=(3, ROWS, CODE)).astype(np.float32)
    before, _ = envs.reset(seed=0)
    before, *_ = envs.step(codes[0])
    untouched = pickle.loads(pickle.dumps(envs))  # noqa: S301
    mask = np.arange(ROWS) % 2 == 0
    options = {"reset_mask": mask}
    after, info = envs.reset(options=options)
    assert list(options) == ["reset_mask"]
    assert info["_steps"].tolist() == mask.tolist()
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert not np.isclose(after[mask], before[mask]).all(-1).any()
    one, other = envs.step(codes[1]), untouched.step(codes[1])
    for found, expected in zip(one[:4], other[:4], strict=True):
        if found.ndim == 1 or not (other[2] | other[3]).any():
            np.testing.assert_allclose(found[~mask], expected[~mask], rtol=1e-5, atol=1e-6)
    first, again = (envs.reset(seed=4, options=options)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difficulty": 3}, r"reset has the option 'difficulty'; expected none but 'reset_mask'"),
        ({"reset_mask": [True] * ROWS}, r"reset_mask is \[True, .*; expected a numpy array of 4 bool"),
        ({"reset_mask": np.zeros(ROWS, bool)}, "at least one True"),
        ({"reset_mask": np.ones(ROWS + 1, bool)}, "expected a numpy array of 4 bool, one a row"),
        ({"reset_mask": np.ones(ROWS)}, "expected a numpy array of 4 bool, one a row"),
    ],
)
def test_other_options_of_a_reset_are_refused(options: dict[str, Any], message: str) -> None:
    envs = InternalVectorEnv(GridworldPinpad(CONFIG), *make_model(), ROWS)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        envs.reset(options=options)
