"""ant-pinpad as Gymnasium environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from metacontroller.domains.ant_pinpad import ENV_ID
from metacontroller.domains.pinpad.tasks import TABLE_A2

pytest.importorskip("mujoco", reason="the extra ant is not installed")

from metacontroller.domains.ant_pinpad.gymnasium_env import AntPinpadEnv, AntPinpadVectorEnv

SMALL = {"size": 3, "num_colors": 2, "num_walls": 1, "task": "0-1", "max_steps": 6}


def torques(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.uniform(-1, 1, (*shape, 8)).astype(np.float32)


def test_passes_gymnasiums_checker() -> None:
    check_env(gymnasium.make(ENV_ID).unwrapped, skip_render_check=True)


def test_made_by_id_with_the_papers_defaults() -> None:
    env = gymnasium.make(ENV_ID)
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    assert env.observation_space.shape == (41,)
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (8,), np.float32)
    assert info["task"] in TABLE_A2
    assert (info["colors_done"], info["subgoal"]) == (0, info["task"][0])


def test_same_seed_same_episodes() -> None:
    first, second = AntPinpadEnv(), AntPinpadEnv()
    for seed in (5, None):
        (a, info_a), (b, info_b) = first.reset(seed=seed), second.reset(seed=seed)
        assert np.array_equal(a, b)
        assert info_a == info_b
    assert not np.array_equal(first.reset(seed=6)[0], second.reset(seed=7)[0])


def test_an_episode_ends_at_the_time_limit() -> None:
    env = AntPinpadEnv(**SMALL)
    env.reset(seed=1)
    outcomes = [env.step(np.zeros(8, np.float32))[1:4] for _ in range(6)]
    assert outcomes == [(0.0, False, False)] * 5 + [(0.0, False, True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "0-2"}, "unknown color 2"),
        ({"tasks": "A2"}, "both tasks and task"),
        ({"num_walls": 20}, "too few"),
        ({"side": 20}, "unknown option 'side'; expected size, num_colors, num_walls, max_steps, cell_size, start_yaw"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
        ({"camera": "below"}, "camera is 'below'; expected one of 'above', 'follow'"),
    ],
)
@pytest.mark.parametrize("make", [AntPinpadEnv, AntPinpadVectorEnv])
def test_bad_arguments_are_named(make: Any, changes: dict[str, Any], message: str) -> None:
    make(**SMALL)
    with pytest.raises(Exception, match=message):
        make(**(SMALL | changes))


def test_steps_before_the_first_reset_are_refused() -> None:
    with pytest.raises(RuntimeError, match="call reset"):
        AntPinpadEnv(**SMALL).step(np.zeros(8))
    with pytest.raises(ValueError, match="num_envs is 0"):
        AntPinpadVectorEnv(0)


def test_the_vector_environment_agrees_with_the_single_one() -> None:
    single, vector = AntPinpadEnv(max_steps=12), AntPinpadVectorEnv(1, max_steps=12, threads=1)
    a, b = single.reset(seed=3)[0], vector.reset(seed=3)[0][0]
    random, ended = np.random.default_rng(0), False
    while not ended:
        assert np.array_equal(a, b)
        action = torques(random)
        a, *outcome, _ = single.step(action)
        observations, *outcomes, _ = vector.step(action[None])
        b = observations[0]
        assert outcome == [value[0] for value in outcomes]
        ended = outcome[1] or outcome[2]


def test_rows_start_anew_on_the_step_after_their_end() -> None:
    envs = gymnasium.make_vec(ENV_ID, num_envs=16, vectorization_mode="vector_entry_point", threads=1, **SMALL)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observations, infos = envs.reset(seed=1)
    assert observations in envs.observation_space
    assert infos["task"].tolist() == [[0, 1]] * 16
    random, ended, resets = np.random.default_rng(0), np.zeros(16, dtype=bool), 0
    for _ in range(15):
        before = observations
        observations, rewards, terminated, truncated, infos = envs.step(torques(random, 16))
        assert infos["_colors_done"].all()
        assert not (rewards + terminated + truncated + infos["colors_done"])[ended].any()
        moved = np.abs(observations[:, 27:29] - before[:, 27:29]).max(1)
        assert bool((moved[~ended] < 0.2).all())
        resets += int(ended.sum())
        ended = terminated | truncated
    assert resets >= 32
