"""The adapter for Stable-Baselines3: what its own `DummyVecEnv` over `InternalEnv` gives, and its algorithms run."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from metacontroller import InternalVectorEnv, MetaController, Transformer
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig

if importlib.util.find_spec("stable_baselines3") is None:
    pytest.skip("stable-baselines3 is not installed (extra expert)", allow_module_level=True)

from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import VecMonitor

from metacontroller.environments.stable_baselines import StableBaselinesEnv

CODE, ROWS = 3, 5
CONFIG = GridworldPinpadConfig(
    size=4, num_colors=2, num_walls=1, max_steps=4, tasks=((0, 1),), post_task=(0, 1), colors_per_subgoal=1
)


def make_env(*, warped: bool = False) -> InternalVectorEnv:
    torch.manual_seed(0)
    model = Transformer(
        8,
        action_embed_readout={"num_discrete": 4},
        state_embed_readout={"grid": {"size": 4, "num_colors": 2, "num_walls": 1}},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    )
    gate = {"mode": "fixed-frequency", "period": 2}
    steering = MetaController(8, dim_meta_controller=8, dim_latent=CODE, rank=2, gate=gate)
    return InternalVectorEnv(GridworldPinpad(CONFIG), model.eval(), steering.eval(), ROWS, warped=warped)


def step(env: StableBaselinesEnv, actions: np.ndarray) -> Any:
    return env.step(actions)


def test_it_says_what_the_inner_environment_says_in_their_words() -> None:
    inner, env = make_env(), StableBaselinesEnv(make_env())
    env.seed(3)
    np.testing.assert_array_equal(env.reset(), inner.reset(seed=3)[0])
    assert env.reset_infos == [{"steps": 0}] * ROWS
    kinds = set()
    for _ in range(12):
        actions = inner.sample_prior()
        observation, rewards, terminated, truncated, info = inner.step(actions)
        found, gains, dones, infos = step(env, actions)
        np.testing.assert_array_equal(found, observation)
        np.testing.assert_array_equal(gains, rewards)
        np.testing.assert_array_equal(dones, terminated | truncated)
        for row, told in enumerate(infos):
            assert told["TimeLimit.truncated"] is bool(truncated[row])
            if not dones[row]:
                assert told == {"steps": info["steps"][row], "TimeLimit.truncated": False}
                continue
            kinds.add((bool(truncated[row]), told["is_success"]))
            np.testing.assert_array_equal(told["terminal_observation"], info["final_obs"][row])
            assert not np.array_equal(told["terminal_observation"], found[row])
            assert told["is_success"] is bool(info["final_info"]["success"][row])
            names = ("steps", "episode_steps", "subgoals_done")
            assert [told[name] for name in names] == [info["final_info"][name][row] for name in names]
    assert {truncated for truncated, _ in kinds} == {True, False}


def test_a_monitor_counts_codes_and_returns() -> None:
    env = VecMonitor(StableBaselinesEnv(make_env()))
    env.reset()
    episodes = []
    for _ in range(12):
        *_, infos = env.step(np.zeros((ROWS, CODE), np.float32))
        episodes += [(info["episode"]["l"], info["episode_steps"]) for info in infos if "episode" in info]
    assert len(episodes) > ROWS
    assert all(codes == -(-steps // 2) for codes, steps in episodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that theirs imports
def test_their_algorithms_run_and_bootstrap_where_an_episode_is_cut() -> None:
    env = StableBaselinesEnv(make_env())
    learner = PPO("MlpPolicy", env, n_steps=8, batch_size=40, n_epochs=1, device="cpu", seed=0)
    before = [value.clone() for value in env.env.model.parameters()]
    learner.learn(160)
    assert learner.num_timesteps == 160
    success: Any = learner.ep_success_buffer
    assert len(success) > 0
    assert all(torch.equal(old, new) for old, new in zip(before, env.env.model.parameters(), strict=True))
    sac = SAC("MlpPolicy", StableBaselinesEnv(make_env(warped=True)), learning_starts=20, buffer_size=500, device="cpu")
    sac.learn(60)
    buffer: Any = sac.replay_buffer
    size = buffer.pos
    assert buffer.timeouts[:size].any()
    assert np.abs(buffer.actions[:size]).max() <= 1
    assert sac.num_timesteps == 60


def test_attributes_are_the_inner_environments_and_calls_for_some_rows_are_refused() -> None:
    env = StableBaselinesEnv(make_env())
    assert env.get_attr("num_envs", [0, 2]) == [ROWS, ROWS]
    assert env.env_is_wrapped(VecMonitor) == [False] * ROWS
    env.set_attr("task", (1, 0))
    assert env.env.task == (1, 0)
    env.reset()
    assert len(env.env_method("sample_prior")) == ROWS
    for call in (lambda: env.set_attr("task", None, 0), lambda: env.env_method("sample_prior", indices=[1])):
        with pytest.raises(ValueError, match="no environments of their own"):
            call()
    env.close()
    assert env.env.closed


def test_it_can_be_pickled() -> None:
    env = StableBaselinesEnv(make_env())
    env.reset()
    copied = pickle.loads(pickle.dumps(env))  # noqa: S301
    actions = np.ones((ROWS, CODE), np.float32)
    for found, expected in zip(copied.step(actions)[:3], env.step(actions)[:3], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_without_the_library_the_error_says_how_to_get_it() -> None:
    script = (
        "import sys; sys.modules['stable_baselines3'] = None\n"
        "from metacontroller.errors import UserError\n"
        "try:\n    import metacontroller.environments.stable_baselines\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'metacontroller-rl[expert]'" in done.stdout
