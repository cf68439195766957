from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from metacontroller.domains.gridworld_pinpad import ENV_ID
from metacontroller.domains.gridworld_pinpad.gymnasium_env import GridworldPinpadEnv, GridworldPinpadVectorEnv
from metacontroller.domains.pinpad.tasks import TABLE_A1

SMALL = {"size": 4, "num_colors": 2, "num_walls": 1, "task": "0-1"}


def cells(observation, size=4):
    """The cell of each object and of the agent, read off an observation vector."""
    return observation.reshape(*observation.shape[:-1], -1, size * size).argmax(-1)


def test_passes_gymnasiums_checker():
    check_env(gymnasium.make(ENV_ID, render_mode="rgb_array").unwrapped)


def test_made_by_id_with_the_papers_defaults():
    env = gymnasium.make(ENV_ID)
    observation, info = env.reset(seed=0)
    assert env.observation_space.shape == (637,)
    assert env.action_space == gymnasium.spaces.Discrete(4)
    assert observation.sum() == 13
    assert info["task"] in TABLE_A1
    assert (info["colors_done"], info["subgoal"]) == (0, info["task"][0])


def walk(position, target, size=4):
    """The action that goes straight towards a cell."""
    (row, column), (target_row, target_column) = divmod(position, size), divmod(target, size)
    if row != target_row:
        return 0 if target_row < row else 1
    return 2 if target_column < column else 3


def test_reward_and_endings_are_apart():
    env = GridworldPinpadEnv(size=4, num_colors=1, num_walls=0, task="0", max_steps=6)
    observation, _ = env.reset(seed=0)
    while True:
        target, position = cells(observation)
        observation, reward, terminated, truncated, info = env.step(walk(position, target))
        if terminated:
            break
        assert (reward, truncated, info["colors_done"], info["subgoal"]) == (0.0, False, 0, 0)
    assert (reward, truncated, info["colors_done"], info["subgoal"]) == (1.0, False, 1, -1)
    observation, _ = env.reset(seed=0)
    target, position = cells(observation)
    away = 0 if position < 4 else 1
    target_column, column = target % 4, position % 4
    assert target_column != column  # so that going up or down never enters the color
    for step in range(6):
        _, reward, terminated, truncated, _ = env.step(away)
        assert (reward, terminated, truncated) == (0.0, False, step == 5)


def test_same_seed_same_episodes():
    first, second = GridworldPinpadEnv(), GridworldPinpadEnv()
    for seed in (5, None, None):
        (a, info_a), (b, info_b) = first.reset(seed=seed), second.reset(seed=seed)
        assert np.array_equal(a, b)
        assert info_a == info_b
    assert not np.array_equal(first.reset(seed=6)[0], second.reset(seed=7)[0])


def test_render_is_a_picture():
    env = GridworldPinpadEnv(render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame is not None
    assert frame.shape == (224, 224, 3)
    assert frame.dtype == np.uint8
    silent = GridworldPinpadEnv()
    silent.reset(seed=0)
    assert silent.render() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "0-2"}, "unknown color 2"),
        ({"tasks": "A1"}, "both tasks and task"),
        ({"task": None}, "unknown color"),  # table A1 needs eight colors
        ({"task": None, "tasks": "A9"}, "'A9' is unknown"),
        ({"num_walls": 20}, "too few"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
@pytest.mark.parametrize("make", [GridworldPinpadEnv, GridworldPinpadVectorEnv])
def test_bad_arguments_are_named(make, changes, message):
    make(**SMALL)
    with pytest.raises(ValueError, match=message):
        make(**(SMALL | changes))


def test_bad_actions_are_named():
    env = GridworldPinpadEnv(**SMALL)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action 4 is out of range"):
        env.step(4)
    vector = GridworldPinpadVectorEnv(2, **SMALL)
    vector.reset(seed=0)
    with pytest.raises(ValueError, match="expected \\(2,\\)"):
        vector.step(np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="num_envs is 0"):
        GridworldPinpadVectorEnv(0)


def test_vector_spaces_and_shapes():
    envs = gymnasium.make_vec(ENV_ID, num_envs=3, vectorization_mode="vector_entry_point", **SMALL)
    assert isinstance(envs, GridworldPinpadVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observations, infos = envs.reset(seed=1)
    assert observations in envs.observation_space
    assert infos["task"].tolist() == [[0, 1]] * 3
    observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
    assert observations in envs.observation_space
    assert (rewards.shape, terminated.dtype, truncated.dtype) == ((3,), np.dtype(bool), np.dtype(bool))
    assert infos["_colors_done"].all()


def test_vector_seeding_is_reproducible():
    first, second = (GridworldPinpadVectorEnv(4, max_steps=3) for _ in range(2))
    assert np.array_equal(first.reset(seed=9)[0], second.reset(seed=9)[0])
    for _ in range(10):  # through several resets
        actions = np.full(4, 1)
        assert np.array_equal(first.step(actions)[0], second.step(actions)[0])


def test_reset_mask_begins_new_episodes_in_its_rows_alone():
    envs = GridworldPinpadVectorEnv(4, size=5, num_colors=3, num_walls=2, task="0-1", max_steps=3)
    envs.reset(seed=2)
    for _ in range(3):
        before, *_, truncated, _ = envs.step(np.zeros(4, int))
    assert truncated.all()
    mask = np.array([True, False, True, False])
    options = {"reset_mask": mask}
    after, infos = envs.reset(options=options)
    assert list(options) == ["reset_mask"]
    assert infos["_task"].tolist() == mask.tolist()
    assert np.array_equal(after[~mask], before[~mask])
    assert not (after[mask] == before[mask]).reshape(2, -1).all(1).any()
    stepped, _, _, truncated, _ = envs.step(np.zeros(4, int))  # the others begin anew, as their episodes had ended
    assert not truncated.any()
    assert not (stepped[~mask] == before[~mask]).reshape(2, -1).all(1).any()
    assert envs.step(np.zeros(4, int))[3].tolist() == [False] * 4
    assert envs.step(np.zeros(4, int))[3].tolist() == mask.tolist()
    with pytest.raises(ValueError, match="reset has the option 'level'; expected none but 'reset_mask'"):
        envs.reset(options={"level": 2})


def test_vector_resets_on_the_step_after_the_end():
    envs = GridworldPinpadVectorEnv(64, size=4, num_colors=2, num_walls=1, task="0-1", max_steps=8)
    observations, _ = envs.reset(seed=0)
    random = np.random.default_rng(0)
    ended = np.zeros(64, dtype=bool)
    resets = changes = 0
    for _ in range(20):
        before = cells(observations)
        observations, rewards, terminated, truncated, infos = envs.step(random.integers(4, size=64))
        layout_changed = (cells(observations)[:, :-1] != before[:, :-1]).any(axis=1)
        assert not layout_changed[~ended].any()
        assert not (rewards + terminated + truncated + infos["colors_done"])[ended].any()
        resets += int(ended.sum())
        changes += int(layout_changed[ended].sum())
        ended = terminated | truncated
    assert resets > 64
    assert changes > 0.95 * resets  # a new layout is hardly ever the old one


def test_vector_agrees_with_the_single_environment():
    single, vector = GridworldPinpadEnv(max_steps=20), GridworldPinpadVectorEnv(1, max_steps=20)
    a, b = single.reset(seed=3)[0], vector.reset(seed=3)[0][0]
    random = np.random.default_rng(0)
    ended = False
    while not ended:
        assert np.array_equal(a, b)
        action = int(random.integers(4))
        a, *outcome, _ = single.step(action)
        observations, *outcomes, _ = vector.step(np.array([action]))
        b = observations[0]
        assert outcome == [value[0] for value in outcomes]
        ended = outcome[1] or outcome[2]


def test_vector_render():
    envs = GridworldPinpadVectorEnv(2, render_mode="rgb_array", **SMALL)
    envs.reset(seed=0)
    frames = envs.render()
    assert frames is not None
    assert [frame.shape for frame in frames] == [(128, 128, 3)] * 2
