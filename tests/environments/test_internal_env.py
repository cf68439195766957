"""Internal RL as an environment: the checker, the rollout it must equal, codes held, rewards summed."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from metacontroller import InternalEnv, MetaController, Transformer
from metacontroller.domains.gridworld_pinpad import ENV_ID
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, tokens_to_onehot
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.domains.guarded_environment import LOST
from metacontroller.domains.pinpad.layouts import Layouts, sample_layouts
from metacontroller.domains.pinpad.tasks import pad_tasks
from metacontroller.errors import UserError
from metacontroller.models.encoders import onehot_to_tokens
from metacontroller.phases.rollout import AbstractRollout, rollout_abstract

GRID = PinpadConfig(size=4, num_colors=2, num_walls=1, max_steps=12)
TASK = (0, 1, 0)
CODE = 3
LOW, HIGH = [[-0.1, -9.0], [0.0, 2.0]], [[0.1, 9.0], [1.0, 3.0]]
BOUNDED = spaces.Box(np.array(LOW, np.float32), np.array(HIGH, np.float32))


def make_model(gate: Any = None, **options: Any) -> tuple[Transformer, MetaController]:
    """Random model and metacontroller, with a gate that opens now and then and codes that matter."""
    grid = {"size": GRID.size, "num_colors": GRID.num_colors, "num_walls": GRID.num_walls}
    defaults: dict[str, Any] = {
        "action_embed_readout": {"num_discrete": 4},
        "state_embed_readout": {"grid": grid},
        "lower_body": {"depth": 1},
        "upper_body": {"depth": 1},
        "condition_on_actions": False,
    }
    model = Transformer(8, **(defaults | options))
    steering = MetaController(8, dim_meta_controller=8, dim_latent=CODE, rank=2, gate=gate)
    for weight in (steering.controller.write, steering.switching.out.weight, steering.switching.code.weight):
        torch.nn.init.normal_(weight, std=2.0)
    return model, steering


def make_env(model: Transformer, steering: MetaController, **extra: Any) -> InternalEnv:
    options = {"size": GRID.size, "num_colors": GRID.num_colors, "num_walls": GRID.num_walls}
    inner = gymnasium.make(ENV_ID, **options, task=TASK, max_steps=GRID.max_steps, disable_env_checker=True)
    return InternalEnv(inner, model, steering, **extra)


class Counting(gymnasium.Env[np.ndarray, Any]):
    """Ends after ``length`` steps; the reward of step t is t; notes its actions. Observation: the step, as a vector."""

    def __init__(self, length: int, *, truncate: bool = False, action_space: spaces.Space | None = None) -> None:
        self.length, self.truncate = length, truncate
        self.observation_space = spaces.Box(0.0, 1e3, (1,), np.float64)
        self.action_space = spaces.Discrete(4) if action_space is None else action_space
        self.taken: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.taken, self.options = [], options
        return np.zeros(1), {"at": 0}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.taken.append(action)
        at = len(self.taken)
        ended = at >= self.length
        return np.full(1, float(at)), float(at), ended and not self.truncate, ended and self.truncate, {"at": at}


def make_counting(length: int, period: int = 3, **options: Any) -> InternalEnv:
    model, steering = make_model(
        {"mode": "fixed-frequency", "period": period}, state_embed_readout={"num_continuous": 1}
    )
    return InternalEnv(Counting(length, **options), model, steering)


def greedy(logits: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
    return logits.argmax(-1)


@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*imum value is.*infinity")  # a residual has no bounds
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # a code is in units of the prior, N(0, I)
def test_gymnasiums_checker_is_content() -> None:
    gate = {"mode": "fixed-frequency", "period": 2}  # the checker wants episodes of more than one step
    check_env(make_env(*make_model(gate)), skip_render_check=True)


def test_an_episode_equals_the_rollout_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steering = make_model()
    monkeypatch.setattr(model.action_readout, "sample", greedy)
    encoded: list[Tensor] = []

    def encode(observation: np.ndarray) -> Tensor:
        encoded.append(onehot_to_tokens(GRID.num_cells, torch.from_numpy(observation)))
        return encoded[-1]

    env = make_env(model, steering, encode_observation=encode)
    lengths = []
    for episode in range(6):
        codes = torch.randn(GRID.max_steps, CODE)
        seen = [env.reset(seed=episode)[0]]
        layout = encoded[-1]
        total, steps, ended = 0.0, 0, False
        while not ended:
            observation, reward, terminated, truncated, info = env.step(codes[len(seen) - 1].numpy())
            seen.append(observation)
            total, steps, ended = total + float(reward), steps + info["steps"], terminated or truncated
        rollout = play(model, steering, layout, codes)
        count = int(rollout.lengths)
        assert len(seen) == count + 1
        torch.testing.assert_close(torch.from_numpy(np.stack(seen[:-1])), rollout.residual[0, :count])
        torch.testing.assert_close(rollout.code[0, :count], codes[:count])
        assert (total, steps) == (float(rollout.returns), int(rollout.steps))
        lengths.append((count, steps))
    assert any(1 < count < steps for count, steps in lengths)


def play(model: Transformer, steering: MetaController, layout: Tensor, codes: Tensor) -> AbstractRollout:
    """The phase's rollout on one layout, given as tokens, taking the codes in turn."""
    tasks, lengths = pad_tasks([TASK])
    grids = PinpadBatch(GRID, Layouts(layout[None, :-1], layout[None, -1]), tasks, lengths)
    left = list(codes)

    def propose(residual: Tensor, state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = [left.pop(0) for _ in range(len(rows))]
        code = torch.stack(chosen) if chosen else codes[:0]
        return code, torch.zeros(len(rows)), state

    return rollout_abstract(model, steering, grids, propose)


def test_one_step_holds_the_code_until_the_gate_opens_and_adds_up_the_rewards() -> None:
    env = make_counting(length=8)
    held: list[Tensor] = []
    env.meta_controller.controller.code_to_hidden.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    observation, info = env.reset(seed=0)
    assert (observation.shape, observation.dtype) == ((8,), np.float32)
    assert info == {"steps": 0, "env_info": {"at": 0}}
    codes = np.random.default_rng(0).normal(size=(3, CODE)).astype(np.float32)
    results = [env.step(code) for code in codes]
    assert [reward for _, reward, *_ in results] == [1 + 2 + 3, 4 + 5 + 6, 7 + 8]
    assert [info for *_, info in results] == [
        {"steps": 3, "env_info": {"at": 3}},
        {"steps": 3, "env_info": {"at": 6}},
        {"steps": 2, "env_info": {"at": 8}},
    ]
    assert [terminated for _, _, terminated, _, _ in results] == [False, False, True]
    assert not any(truncated for *_, truncated, _ in results)
    expected = np.repeat(codes, [3, 3, 2], axis=0)
    np.testing.assert_array_equal(torch.cat(held).numpy(), expected)


class Faulty(Counting):
    """Its third step returns what it is told to, in place of an observation or a reward."""

    def __init__(self, **given: Any) -> None:
        super().__init__(8)
        self.given = given

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        observation, info = super().reset(seed=seed, options=options)
        return self.given.get("first", observation), info

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        if len(self.taken) == 3:
            return self.given.get("observation", observation), self.given.get("reward", reward), *rest
        return np.float32(observation), [reward], *rest


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward": None}, "the reward is None"),
        ({"reward": np.nan}, "the reward is nan"),
        ({"observation": np.full(1, np.nan)}, "the observation is nan at [0]"),
        ({"observation": np.zeros(2)}, "the observation has the shape (2,)"),
        ({"observation": None}, "the observation is None"),
    ],
)
def test_what_is_not_of_its_space_costs_its_episode(
    given: dict[str, Any], said: str, capsys: pytest.CaptureFixture
) -> None:
    LOST.clear()
    model, steering = make_model({"mode": "fixed-frequency", "period": 5}, state_embed_readout={"num_continuous": 1})
    env = InternalEnv(Faulty(**given), model, steering)
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(np.zeros(CODE, np.float32))
    assert (reward, terminated, truncated) == (1 + 2, False, True)
    assert info == {"steps": 2, "env_info": {"at": 2}, "lost": True}
    assert np.isfinite(observation).all()
    assert said in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step(np.zeros(CODE, np.float32))
    again, _ = env.reset(seed=0)
    assert np.isfinite(again).all()


def test_a_first_observation_that_is_not_of_its_space_is_refused() -> None:
    model, steering = make_model({"mode": "forced"}, state_embed_readout={"num_continuous": 1})
    with pytest.raises(UserError, match=r"env cannot be reset: the observation is nan at \[0\]; expected one of Box"):
        InternalEnv(Faulty(first=np.full(1, np.nan)), model, steering).reset()
    own = InternalEnv(Faulty(), model, steering, encode_observation=lambda seen: torch.tensor([np.inf]))
    with pytest.raises(UserError, match="env cannot be reset: the observation as the model reads it is not finite"):
        own.reset()


def test_a_time_limit_truncates() -> None:
    env = make_counting(length=2, truncate=True)
    env.reset(seed=0)
    *_, terminated, truncated, info = env.step(np.zeros(CODE, np.float32))
    assert (terminated, truncated, info["steps"]) == (False, True, 2)


def test_seeds_settle_what_is_sampled_and_options_are_passed_on() -> None:
    env = make_counting(length=30, period=10)
    inner: Any = env.env

    def actions(seed: int | None) -> list[Any]:
        env.reset(seed=seed, options={"some": "option"})
        assert inner.options == {"some": "option"}
        env.step(np.zeros(CODE, np.float32))
        return inner.taken

    first = actions(1)
    assert first == actions(1)
    assert first != actions(2)
    assert all(type(action) is np.int64 and env.env.action_space.contains(action) for action in first)
    later = [actions(None), actions(None)]
    assert later[0] != later[1]


def test_the_residual_is_that_of_the_model_which_knows_its_past_actions() -> None:
    model, steering = make_model(
        {"mode": "forced"}, state_embed_readout={"num_continuous": 1}, condition_on_actions=True
    )
    env = InternalEnv(Counting(5), model, steering)
    seen = [env.reset(seed=0)[0]]
    seen += [env.step(np.ones(CODE, np.float32))[0] for _ in range(5)]
    inner: Any = env.env
    states = torch.arange(6.0)[None, :, None]
    actions = torch.tensor(np.array([*inner.taken, 0]))[None]
    torch.testing.assert_close(torch.from_numpy(np.stack(seen)), model.residual(states, actions)[0])


def test_gaussian_actions_are_clipped_to_the_environments_bounds() -> None:
    bounds = spaces.Box(np.array([-0.1, -9.0], np.float32), np.array([0.1, 9.0], np.float32))
    model, steering = make_model(
        {"mode": "forced"},
        state_embed_readout={"num_continuous": 1},
        action_embed_readout={"num_continuous": 2},
        condition_on_actions=True,
    )
    env = InternalEnv(Counting(20, action_space=bounds), model, steering)
    env.reset(seed=0)
    for _ in range(20):
        env.step(np.zeros(CODE, np.float32))
    inner: Any = env.env
    taken = np.stack(inner.taken)
    assert all(bounds.contains(action) for action in inner.taken)
    assert set(np.abs(taken[:, 0]).round(6)) >= {np.float32(0.1).round(6)}
    assert (np.abs(taken[:, 1]) > 0.1).any()


@pytest.mark.parametrize(
    ("space", "readout"),
    [
        (spaces.Discrete(3, start=5), {"num_discrete": 3}),
        (spaces.MultiDiscrete([2, 3], start=[1, -1]), {"num_discrete": [2, 3]}),
        (spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])), {"num_discrete": [2, 3, 4, 2]}),
        (spaces.MultiBinary(2), {"num_discrete": [2, 2]}),
        (BOUNDED, {"num_continuous": 4}),
    ],
    ids=lambda value: str(value).partition("\n")[0],
)
def test_every_action_space_that_data_may_have_is_acted_in(space: spaces.Space, readout: dict[str, Any]) -> None:
    model, steering = make_model(
        {"mode": "forced"},
        state_embed_readout={"num_continuous": 1},
        action_embed_readout=readout,
        condition_on_actions=True,
    )
    inner = Counting(30, action_space=space)
    env = InternalEnv(inner, model, steering)
    env.reset(seed=0)
    for _ in range(30):
        env.step(np.zeros(CODE, np.float32))
    assert all(space.contains(action) for action in inner.taken)
    assert len({np.asarray(action).tobytes() for action in inner.taken}) > 2


def test_observations_are_read_as_a_dataset_would_hold_them() -> None:
    class Structured(Counting):
        def __init__(self) -> None:
            super().__init__(3)
            box = spaces.Box(-1.0, 1.0, (2, 2), np.float64)
            self.observation_space = spaces.Dict({"a": spaces.Discrete(3, start=1), "b": box, "c": spaces.Text(9)})  # type: ignore[assignment]

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            _, info = super().reset(seed=seed)
            return {"a": np.int64(2), "b": np.array([[0.1, 0.2], [0.3, 0.4]]), "c": "word"}, info

    model, steering = make_model(state_embed_readout={"num_continuous": 7})
    observation, _ = InternalEnv(Structured(), model, steering).reset(seed=0)
    state = torch.tensor([[[0.0, 1.0, 0.0, 0.1, 0.2, 0.3, 0.4]]])
    torch.testing.assert_close(torch.from_numpy(observation), model.lower(model.embed(state))[0, 0].detach())


def test_codes_are_clipped_to_the_bounds() -> None:
    env = make_counting(length=9)
    held: list[Tensor] = []
    env.meta_controller.controller.code_to_hidden.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    env.reset(seed=0)
    env.step(np.array([-99.0, 0.5, 99.0]))
    assert held[0].tolist() == [[-5.0, 0.5, 5.0]]
    assert env.action_space == spaces.Box(-5.0, 5.0, (CODE,), np.float32)


def test_the_encoding_can_be_given() -> None:
    model, steering = make_model({"mode": "forced"}, state_embed_readout={"num_continuous": 2})
    env = InternalEnv(
        Counting(3), model, steering, encode_observation=lambda seen: torch.tensor([seen[0], 7.0]).float()
    )
    observation, _ = env.reset(seed=0)
    expected = model.lower(model.embed(torch.tensor([[[0.0, 7.0]]])))[0, 0]
    torch.testing.assert_close(torch.from_numpy(observation), expected.detach())


def test_the_model_is_only_read() -> None:
    env = make_counting(length=4)
    before = [value.clone() for value in [*env.model.parameters(), *env.meta_controller.parameters()]]
    env.reset(seed=0)
    env.step(np.zeros(CODE, np.float32))
    after = [*env.model.parameters(), *env.meta_controller.parameters()]
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, after, strict=True))


def test_pictures_and_closing_are_the_inner_environments() -> None:
    model, steering = make_model()
    inner = gymnasium.make(ENV_ID, size=4, num_colors=2, num_walls=1, task=TASK, render_mode="rgb_array")
    env = InternalEnv(inner, model, steering)
    env.reset(seed=0)
    assert env.render_mode == "rgb_array"
    np.testing.assert_array_equal(env.render(), np.asarray(inner.render()))
    closed = []
    inner.unwrapped.close = lambda: closed.append(True)  # pyright: ignore[reportAttributeAccessIssue]
    env.close()
    assert closed == [True]


@pytest.mark.parametrize("action", [np.zeros(CODE + 1), np.zeros((1, CODE)), np.full(CODE, np.nan)])
def test_actions_that_are_no_codes_are_refused(action: np.ndarray) -> None:
    env = make_counting(length=4)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected finite numbers of shape \(3,\)"):
        env.step(action)


def test_steps_outside_an_episode_are_refused() -> None:
    env = make_counting(length=1)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(np.zeros(CODE))
    env.reset(seed=0)
    env.step(np.zeros(CODE))
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(np.zeros(CODE))


def test_environments_that_do_not_fit_are_refused() -> None:
    model, steering = make_model(state_embed_readout={"num_continuous": 1})
    with pytest.raises(ValueError, match=r"Discrete\(5\); expected Discrete\(4\)"):
        InternalEnv(Counting(3, action_space=spaces.Discrete(5)), model, steering)
    gaussian, _ = make_model(action_embed_readout={"num_continuous": 2})
    with pytest.raises(ValueError, match=r"expected a Box of 2 numbers"):
        InternalEnv(Counting(3), gaussian, steering)
    with pytest.raises(ValueError, match="dim_model 12; expected 8"):
        InternalEnv(Counting(3), model, MetaController(12, dim_meta_controller=8, dim_latent=2, rank=2))


def test_onehot_to_tokens_undoes_tokens_to_onehot() -> None:
    layouts = sample_layouts(GRID, 6)
    tokens = torch.cat([layouts.objects, layouts.agent[:, None]], 1)
    assert torch.equal(onehot_to_tokens(GRID.num_cells, tokens_to_onehot(GRID, tokens)), tokens)
    assert torch.equal(onehot_to_tokens(GRID.num_cells, tokens_to_onehot(GRID, tokens[0])), tokens[0])


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.zeros(17), "17 entries: expected a multiple of 16"),
        (torch.zeros(32), "not one-hot"),
        (torch.ones(32), "not one-hot"),
        (torch.eye(16)[0] * 0.5, "not one-hot"),
    ],
)
def test_vectors_that_are_no_grid_are_refused(vector: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onehot_to_tokens(16, vector)


def counting_env(**options: Any) -> InternalEnv:
    model, steering = make_model({"mode": "forced"}, state_embed_readout={"num_continuous": 1})
    return InternalEnv(Counting(20), model, steering, **options)


def distance_from_the_prior(codes: Tensor) -> float:
    """The largest gap between the distribution of all entries and N(0, I), as a multiple of its error."""
    values = codes.flatten().sort().values
    quantiles = torch.distributions.Normal(0.0, 1.0).cdf(values)
    return float((quantiles - torch.linspace(0, 1, len(values))).abs().max()) * len(values) ** 0.5


@pytest.mark.parametrize("warped", [False, True])
def test_samples_of_its_actions_are_codes_of_the_prior(warped: bool) -> None:
    env = counting_env(warped=warped)
    limit = 1.0 if warped else 5.0
    assert env.action_space == spaces.Box(-limit, limit, (CODE,), np.float32)
    env.action_space.seed(0)
    env.reset(seed=0)
    many = gymnasium.vector.SyncVectorEnv([lambda: counting_env(warped=warped)] * 2)
    many.action_space.seed(1)
    for sample in (env.action_space.sample, env.sample_prior, many.action_space.sample):
        actions = np.stack([sample() for _ in range(600)])
        assert actions.dtype == np.float32
        assert np.abs(actions).max() <= limit
        assert distance_from_the_prior(env.action_space.codes(torch.from_numpy(actions))) < 1.7
    env.reset(seed=5)
    first = env.sample_prior()
    env.reset(seed=5)
    np.testing.assert_array_equal(env.sample_prior(), first)


def test_a_warped_action_steers_as_the_code_that_it_stands_for() -> None:
    plain, warped = counting_env(), counting_env(warped=True)
    warped.model, warped.meta_controller = plain.model, plain.meta_controller
    code = torch.tensor([-1.5, 0.2, 0.9])
    action = 2 * torch.distributions.Normal(0.0, 1.0).cdf(code) - 1
    for env in (plain, warped):
        env.reset(seed=0)
    for given, env in ((code, plain), (action, warped)):
        env.step(given.numpy())
    assert plain._episode is not None
    assert warped._episode is not None
    torch.testing.assert_close(warped._episode.state.z, code[None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(warped._episode.state.z, plain._episode.state.z, rtol=1e-4, atol=1e-5)
