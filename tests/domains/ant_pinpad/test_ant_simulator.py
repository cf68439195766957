"""The rules of ant-pinpad, and its physics against a plain loop over MuJoCo."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from metacontroller.domains.ant_pinpad import simulator
from metacontroller.domains.ant_pinpad.layouts import DOWN, LEFT, RIGHT, STEPS, UP, Arena
from metacontroller.domains.ant_pinpad.observation import state_of
from metacontroller.domains.ant_pinpad.simulator import HEIGHT, AntBatch, start_ants
from metacontroller.domains.ant_pinpad.symmetry import turn_body, turn_torques, turn_world
from metacontroller.domains.base import BatchedEnv
from metacontroller.domains.pinpad.tasks import pad_tasks

mujoco = pytest.importorskip("mujoco", reason="the extra ant is not installed")

ARENA = Arena(max_steps=30, cell_size=2.0)
OBJECTS = (0, 2, 8, 10, 5)  # colors in cells 0, 2, 8 and 10, the wall in cell 5


def random_state(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def torques(n: int, seed: int) -> torch.Tensor:
    return torch.rand((n, 8), generator=random_state(seed)) * 2 - 1


def crossing(cell: int, direction: int, tasks: list[tuple[int, ...]]) -> AntBatch:
    """Ants about to leave a cell in a direction, one for each task."""
    down, right = STEPS[direction]
    state = torch.zeros((len(tasks), 29), dtype=torch.float64)
    state[:, :2] = ARENA.center(torch.tensor(cell)) + 0.98 * torch.tensor([right, -down])
    state[:, 2], state[:, 3] = 0.75, 1.0
    state[:, 15:17] = 3.0 * torch.tensor([right, -down])
    padded, lengths = pad_tasks(tasks)
    objects = torch.tensor(OBJECTS).expand(len(tasks), -1)
    return AntBatch(ARENA, objects, state, padded.long(), lengths, threads=1)


def still(n: int) -> torch.Tensor:
    return torch.zeros(n, 8)


def outcome(env: AntBatch) -> list[tuple[bool, bool, int, int, int]]:
    """terminated, success, subgoals_done, goal and reached of each row."""
    columns = (env.terminated, env.success, env.subgoals_done, env.goal(), env.reached())
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_a_color_is_visited_by_entering_its_cell() -> None:
    env = crossing(1, RIGHT, [(1, 0), (1,), (0, 1), ()])  # into cell 2, color 1
    assert isinstance(env, BatchedEnv)
    rewards = env.step(still(4))
    assert env.cell.tolist() == [2] * 4
    assert outcome(env) == [
        (False, False, 1, 0, 1),  # the next color of two
        (True, True, 1, -1, 1),  # the last one
        (True, False, 0, 0, 1),  # a wrong one
        (False, False, 0, -1, 1),  # no task: nothing is wrong
    ]
    assert rewards.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert env.step(still(4)).tolist() == [0.0] * 4
    assert env.steps.tolist() == [2, 1, 1, 2]
    assert env.reached().tolist() == [-1] * 4
    assert env.subgoals_done.tolist() == [1, 1, 0, 0]  # staying on a color is no visit


def test_rows_that_ended_stay_as_they_are() -> None:
    env = crossing(1, RIGHT, [(1,), (1, 0)])
    env.step(still(2))
    before = env.state
    env.step(torch.ones(2, 8))
    assert torch.equal(env.state[0], before[0])
    assert not torch.equal(env.state[1], before[1])


def test_walls_and_the_edge_of_the_plane_end_an_episode() -> None:
    wall, edge = crossing(4, RIGHT, [(0,), ()]), crossing(15, DOWN, [(0,), ()])
    for env in (wall, edge):
        assert env.step(still(2)).tolist() == [0.0, 0.0]
        assert env.terminated.tolist() == [True, True]
        assert not bool(env.success.any() | env.truncated.any())
        assert bool(torch.isfinite(env.observation).all())
    assert crossing(13, UP, [(0,)]).step(still(1)).tolist() == [0.0]


@pytest.mark.parametrize(("limits", "ends"), [((0.2, 1.0), False), ((0.8, 1.0), True), ((0.2, 0.5), True)])
def test_the_torso_has_to_keep_its_height(
    limits: tuple[float, float], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert HEIGHT == (0.2, 1.0)  # the floor hardly lets it sink below, so the test moves the limits
    monkeypatch.setattr(simulator, "HEIGHT", limits)
    env = crossing(14, LEFT, [(0,)])  # from an empty cell to an empty one
    env.step(still(1))
    assert 0.5 < float(env.state[0, 2]) < 0.8
    assert env.terminated.tolist() == [ends]


def test_an_episode_is_truncated_at_its_time_limit() -> None:
    env = start_ants(ARENA, [(0, 1)] * 8, random_state(), 1)
    while not bool((env.terminated | env.truncated).all()):
        env.step(still(8))
    assert bool(env.truncated.any())
    assert env.steps[env.truncated].unique().tolist() == [30]
    assert not bool((env.terminated & env.truncated).any())


def test_a_step_is_that_of_mujoco() -> None:
    from metacontroller.domains.ant_pinpad.engine import ant_model

    env = start_ants(ARENA, [()] * 4, random_state(), 2)
    model, data = ant_model(), mujoco.MjData(ant_model())
    for step in range(5):
        before, action = env.state.numpy(), torques(4, step)
        env.step(action)
        for row in range(4):
            mujoco.mj_resetData(model, data)
            data.qpos[:], data.qvel[:] = before[row, :15], before[row, 15:]
            data.ctrl[:] = action[row].numpy()
            mujoco.mj_step(model, data, nstep=5)
            assert np.array_equal(env.state[row].numpy(), np.concatenate([data.qpos, data.qvel]))


def test_actions_are_clipped_and_neighbors_and_threads_change_nothing() -> None:
    first, second = (start_ants(ARENA, [()] * 6, random_state(), threads) for threads in (1, 2))
    second.select(torch.tensor([5, 2]))
    for step in range(6):
        action = 3 * torques(6, step)
        first.step(action)
        second.step(action[[5, 2]].clamp(-1, 1))
    assert torch.equal(first.state[[5, 2]], second.state)
    assert torch.equal(first.observation[[5, 2]], second.observation)


def test_a_simulation_that_diverges_ends_its_episode_alone() -> None:
    env = start_ants(ARENA, [()] * 2, random_state(), 1)
    env.state[0, 20] = 1e12
    before = env.state.clone()
    env.step(still(2))
    assert env.terminated.tolist() == [True, False]
    assert torch.equal(env.state[0], before[0])
    assert bool(torch.isfinite(env.observation).all())


def test_the_physics_does_not_know_of_a_quarter_turn() -> None:
    env = start_ants(ARENA, [()] * 8, random_state(), 1)
    seen = [env.observation]
    state = env.state
    for step in range(3):
        env.step(torques(8, step))
        seen.append(env.observation)
    shown = turn_world(ARENA, torch.stack(seen, 1).double(), torch.arange(8) % 4)
    other = start_ants(ARENA, [()] * 8, random_state(), 1)
    other.state = state_of(ARENA, shown[:, 0])
    assert float((other.state[:, :2] - state[:, :2]).abs().max()) > 1
    for step in range(3):
        other.step(torques(8, step))
    assert torch.allclose(other.state, state_of(ARENA, shown[:, 3]), atol=1e-3, rtol=1e-3)


def test_the_physics_does_not_know_from_which_leg_one_counts() -> None:
    env, quarter = start_ants(ARENA, [()] * 8, random_state(), 1), torch.arange(8) % 4
    other = start_ants(ARENA, [()] * 8, random_state(), 1)
    other.state = torch.cat([env.state[:, :2], turn_body(env.state[:, 2:], quarter)], 1)
    assert torch.equal((other.state - env.state).abs().amax(1) > 0.01, quarter > 0)
    for step in range(12):  # legs are on the ground by then
        action = torques(8, step).double()
        env.step(action)
        other.step(turn_torques(action, quarter))
    expected = torch.cat([env.state[:, :2], turn_body(env.state[:, 2:], quarter)], 1)
    assert float(env.state[:, 2].min()) < 0.5
    assert torch.allclose(other.state, expected, atol=1e-10)
    back = turn_body(turn_body(env.state[:, 2:], quarter), -quarter % 4)
    assert torch.allclose(back.abs(), env.state[:, 2:].abs(), atol=1e-12)  # a quaternion may come back negated


def test_starts_are_as_the_paper_says() -> None:
    env = start_ants(ARENA, [()] * 400, random_state(), 1)
    state = env.state
    assert torch.equal(ARENA.cell(state[:, :2]), env.cell)
    assert not bool((env.objects == env.cell[:, None]).any())
    local = (state[:, :2] - ARENA.center(env.cell)) / (ARENA.cell_size / 2)
    assert float(local.min()) < -0.95
    assert float(local.max()) > 0.95
    yaw = 2 * torch.atan2(state[:, 6], state[:, 3])
    assert torch.allclose(state[:, 3:7].norm(dim=1), torch.ones(400).double())
    assert float(yaw.min()) < -0.9 * math.pi
    assert float(yaw.max()) > 0.9 * math.pi
    quarter = start_ants(replace(ARENA, start_yaw=math.pi / 4), [()] * 400, random_state(), 1).state
    assert 0.98 * math.pi / 4 < float((2 * torch.atan2(quarter[:, 6], quarter[:, 3])).abs().max()) <= math.pi / 4
    noise = state[:, 7:]
    assert 0.099 < float(noise.abs().max()) <= 0.1
    assert abs(float(noise.mean())) < 0.01


def test_rows_are_kept_and_replaced() -> None:
    env, new = start_ants(ARENA, [(0, 1)] * 5, random_state(), 1), start_ants(ARENA, [(2,)] * 2, random_state(1), 1)
    env.step(torques(5, 0))
    seen = copy(env)
    env.select(torch.tensor([4, 1]))
    assert len(seen) == 5
    assert torch.equal(env.observation, seen.observation[[4, 1]])
    with pytest.raises(ValueError, match=r"tasks of shape \(2, 1\); expected .* and \(2, 2\)"):
        seen.replace(torch.tensor([0, 3]), new)
    new = start_ants(ARENA, [(2,)] * 2, random_state(1), 1, width=2)
    before = seen.state
    seen.replace(torch.tensor([0, 3]), new)
    assert torch.equal(seen.state[[0, 3]], new.state)
    assert torch.equal(seen.state[[1, 2, 4]], before[[1, 2, 4]])
    assert seen.goal().tolist() == [2, 0, 0, 2, 0]
    assert seen.steps.tolist() == [0, 1, 1, 0, 1]


def test_wrong_actions_and_states_are_refused() -> None:
    env = start_ants(ARENA, [()] * 2, random_state(), 1)
    with pytest.raises(ValueError, match=r"actions have shape \(2, 7\); expected \(2, 8\)"):
        env.step(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="a state lies beyond the plane"):
        AntBatch(ARENA, env.objects, env.state + 9.0, env.tasks, env.task_lengths)
