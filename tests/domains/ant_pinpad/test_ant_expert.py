"""What the expert is told, its file, and its episodes on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from metacontroller.domains.ant_pinpad.expert import AHEAD, AROUND, FEATURES, Expert, Guide, play
from metacontroller.domains.ant_pinpad.layouts import LEFT, STEPS, UP, Arena
from metacontroller.domains.ant_pinpad.observation import heading, symexp
from metacontroller.domains.ant_pinpad.simulator import AntBatch, start_ants
from metacontroller.domains.ant_pinpad.symmetry import turned
from metacontroller.domains.pinpad.worlds import open_dataset

pytest.importorskip("mujoco", reason="the extra ant is not installed")

from metacontroller.domains.ant_pinpad import dataset
from metacontroller.domains.ant_pinpad.dataset import Recipe, generate, versions

ARENA = Arena(size=3, num_colors=2, num_walls=1, max_steps=8, cell_size=2.0)


def random_state(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recipe(**changes: object) -> Recipe:
    options = {"arena": ARENA, "expert": Expert.untrained(), "tasks": ((0, 1), (1, 0)), "seed": 0, "threads": 1}
    options |= {"mean_actions": True, "only_successes": False}
    return Recipe(**(options | changes))  # pyright: ignore[reportArgumentType]


def facing(yaw: float, velocity: tuple[float, float]) -> AntBatch:
    """An ant in the last cell, with color 0 at the other end of its row; the wall lies above it."""
    state = torch.zeros((1, 29), dtype=torch.float64)
    state[0, :2] = ARENA.center(torch.tensor(8)) + torch.tensor([0.5, 0.25])
    state[0, 2:4] = torch.tensor([0.75, math.cos(yaw / 2)])
    state[0, 6], state[0, 15:17] = math.sin(yaw / 2), torch.tensor(velocity).double()
    objects, tasks = torch.tensor([[6, 0, 5]]), torch.tensor([[0, 1]])
    return AntBatch(ARENA, objects, state, tasks, torch.tensor([2]), 1)


def test_the_guide_points_along_the_shortest_way() -> None:
    guide = Guide(facing(0.0, (0.0, 0.0)))
    assert guide.way().tolist() == [[-1.0, 0.0]]  # to the left
    assert [int(guide.direction(torch.tensor([cell]))) for cell in (7, 6, 5)] == [LEFT, -1, -1]  # then color and wall
    guide.env.colors_done = torch.tensor([1])
    assert guide.direction(torch.tensor([3])).tolist() == [UP]
    guide.env.colors_done = torch.tensor([2])  # all done
    assert guide.direction(torch.tensor([7])).tolist() == [-1]
    assert guide.way().tolist() == [[0.0, 0.0]]


def test_features_show_the_way_to_the_right_and_the_ant_looking_there() -> None:
    yaw = math.pi / 2 + 0.2  # about up; the way goes to the left, so the world is turned by two right angles
    guide = Guide(facing(yaw, (-3.0, 0.5)))
    features = guide.features()
    assert features.shape == (1, FEATURES)
    inner, local = symexp(features[0, :27].double()), features[0, 27:29]
    cos, sin = heading(inner[1:5])
    assert math.isclose(math.atan2(sin, cos), 0.2, abs_tol=1e-5)  # from 0.2 beyond down to 0.2 beyond right
    assert torch.allclose(inner[13:15], torch.tensor([3.0, -0.5]).double(), atol=1e-5)
    assert torch.allclose(local, torch.tensor([-0.5, -0.25]), atol=1e-5)
    closed = dict(zip(AROUND, features[0, 29:37].tolist(), strict=True))
    assert [place for place, shut in closed.items() if shut] == [
        *((-1, 1), (0, 1), (1, 1), (-1, 0), (-1, -1)),  # beyond the plane
        (0, -1),  # the wall
    ]
    assert features[0, 37:].tolist() == [1.0, 0.0]  # on from the cell ahead


def test_features_tell_of_the_cells_around() -> None:
    env = start_ants(ARENA, [(0, 1)] * 60, random_state(), 1)
    guide = Guide(env)
    world, _ = guide.frame()
    features = guide.features()
    for row in range(len(env)):
        turn, (below, right) = int(world[row]), divmod(int(env.cell[row]), ARENA.size)
        found = dict(zip(env.objects[row].tolist(), range(ARENA.num_objects), strict=True))
        for column, place in enumerate(AROUND):
            x, y = place
            for _ in range(turn):  # back to the world
                x, y = y, -x
            cell = (below - y, right + x)
            inside = all(0 <= side < ARENA.size for side in cell)
            thing = found.get(cell[0] * ARENA.size + cell[1]) if inside else None
            assert bool(features[row, 29 + column]) == (not inside or thing not in (None, int(env.goal()[row])))
            if column == AHEAD:
                assert thing in (None, int(env.goal()[row]))  # the way leads there
                way = int(guide.direction(torch.tensor([cell[0] * ARENA.size + cell[1]]).repeat(len(env)))[row])
                x, y = (0, 0) if way < 0 else (STEPS[way][1], -STEPS[way][0])
                for _ in range(turn):
                    x, y = -y, x
                assert features[row, 37:].tolist() == [x, y]


def test_the_frame_always_has_the_way_to_the_right_and_the_ant_looking_there() -> None:
    env = start_ants(ARENA, [(0, 1)] * 200, random_state(), 1)
    guide = Guide(env)
    world, body = guide.frame()
    way = turned(guide.way(), world[:, None])
    assert torch.equal(way, torch.tensor([1.0, 0.0]).double().expand(200, 2))
    assert set(world.tolist()) == set(body.tolist()) == {0, 1, 2, 3}
    inner = symexp(guide.features()[:, :27].double())
    cos, sin = heading(inner[:, 1:5]).unbind(-1)
    assert float(torch.atan2(sin, cos).abs().max()) < math.pi / 4 + 1e-5


def test_an_expert_acts_from_normalized_features_within_the_limits() -> None:
    expert = Expert(5, (4,))
    expert.mean.fill_(2.0)
    expert.std.fill_(3.0)
    features = torch.tensor([[2.0, 5.0, -1.0, 200.0, 2.0]])
    normal = torch.tensor([[0.0, 1.0, -1.0, 10.0, 0.0]])
    assert torch.equal(expert(features), expert.head(expert.body(normal)))
    with torch.no_grad():
        expert.head.bias.fill_(50.0)
    assert expert.act(features).tolist() == [[1.0] * 8]
    with torch.no_grad():
        expert.head.bias.fill_(0.0)
    sampled = torch.cat([expert.act(features, random_state(seed)) for seed in range(50)])
    assert float(sampled.std()) > 0.4
    assert float(sampled.abs().max()) <= 1.0


def test_a_saved_expert_comes_back(tmp_path: Path) -> None:
    expert = Expert(7, (4, 3))
    expert.save(tmp_path / "a", {"mujoco": "4.0.0"})
    expert.save(tmp_path / "b", {"mujoco": "4.0.0"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again, about = Expert.load(tmp_path / "a")
    assert about == {"mujoco": "4.0.0"}
    assert again.fingerprint() == expert.fingerprint() != Expert(7, (4, 3)).fingerprint()
    (tmp_path / "c").write_text("weights")
    for name, message in (("c", "is not a complete safetensors file"), ("d", "there is no expert in .*train one")):
        with pytest.raises(ValueError, match=message):
            Expert.load(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [{"mean": torch.ones(7)}, {"mean": torch.zeros(8)}, {"std": torch.full((7,), torch.nan)}, {"more": torch.ones(1)}],
)
def test_an_expert_that_was_changed_is_refused(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    Expert(7, (4,)).save(tmp_path / "a", {"success": 0.5})
    with safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    save_file({**tensors, **change}, tmp_path / "a", metadata=metadata)
    with pytest.raises(ValueError, match=r"is not what was written|holds NaN"):
        Expert.load(tmp_path / "a")
    header = json.loads(metadata["ant-expert"])
    for said in ({**header, "about": {"success": 1.0}}, {**header, "hidden": [2**40]}, {**header, "features": "7"}):
        save_file(tensors, tmp_path / "a", metadata={"ant-expert": json.dumps(said)})
        with pytest.raises(ValueError, match="is not what was written"):
            Expert.load(tmp_path / "a")
    del header["sha256"]  # as before there was one
    save_file(tensors, tmp_path / "a", metadata={"ant-expert": json.dumps(header)})
    assert Expert.load(tmp_path / "a")[1] == {"success": 0.5}


def test_an_expert_of_other_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the expert observes 73 numbers; expected 39"):
        play(start_ants(ARENA, [(0,)], random_state(), 1), Expert(73), None)


def test_episodes_are_labelled_and_padded() -> None:
    env = start_ants(ARENA, [(0, 1), (1,)] * 60, random_state(), 1)
    starts = env.observation
    made = play(env, Expert.untrained(), random_state())
    assert torch.equal(made.states[:, 0], starts)
    assert torch.equal(made.states[:, -1], env.observation)
    assert made.subgoals is not None
    assert made.segments is not None
    real = made.mask()
    assert set(made.subgoals[real].tolist()) == {0, 1}
    assert bool((made.segments.amax(1) <= env.subgoals_done).all())
    assert made.actions[~real].abs().sum() == 0
    assert set(made.subgoals[~real].tolist()) <= {-1}
    assert int(made.lengths.min()) < int(made.lengths.max()) == 8


def test_a_dataset_is_written_again_bit_for_bit(tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 2)):
        written = recipe(mean_actions=False, threads=threads)
        open_dataset(written, 12, tmp_path / name, versions())
    folder = written.folder(12)
    files = {path.name for path in (tmp_path / "a" / folder).iterdir()}
    arrays = ("actions", "lengths", "segments", "states", "subgoals")
    assert files == {"store.json", *(f"{name}.npy" for name in arrays)}
    for name in files:
        assert (tmp_path / "a" / folder / name).read_bytes() == (tmp_path / "b" / folder / name).read_bytes()


def test_a_dataset_is_made_once_and_depends_on_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_dataset(recipe(), 6, tmp_path, versions())
    assert len(first) == 6
    assert isinstance(first.arrays["states"], np.memmap)
    other = Expert(FEATURES, (8,))
    changes = [{"seed": 1}, {"mean_actions": False}, {"only_successes": True}, {"tasks": ((0, 1),)}, {"expert": other}]
    folders = {recipe(**change).folder(6) for change in [{}, {"threads": 2}, *changes]}
    assert len(folders) == 1 + len(changes)
    monkeypatch.setattr(Recipe, "make", lambda *_: pytest.fail("made again"))
    again = open_dataset(recipe(threads=2), 6, tmp_path, versions())
    assert np.array_equal(first.arrays["states"], again.arrays["states"])


def test_another_version_of_mujoco_warns(tmp_path: Path) -> None:
    made = open_dataset(recipe(), 3, tmp_path, versions())
    assert made.meta["versions"] == versions()
    with pytest.warns(UserWarning, match=r"was made with mujoco .* and 0\.9 is installed"):
        open_dataset(recipe(), 3, tmp_path, {"mujoco": "0.9"})


def test_an_expert_that_never_succeeds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MOST_ATTEMPTS", 0.01)
    with pytest.raises(ValueError, match=r"the expert solved 0 of .* episodes and 4 are asked for; train it longer"):
        generate(recipe(only_successes=True), 4)
