"""ant-pinpad as a world: its config, its interface, and the chain of all phases."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller.cli import main
from metacontroller.domains import ant_pinpad
from metacontroller.domains.ant_pinpad import domain as domain_module
from metacontroller.domains.ant_pinpad import simulator
from metacontroller.domains.ant_pinpad.domain import AntPinpad, AntPinpadConfig
from metacontroller.domains.ant_pinpad.expert import Expert, play
from metacontroller.domains.ant_pinpad.observation import ORIENTATION, heading, objects_of, parts_of, state_of
from metacontroller.domains.ant_pinpad.simulator import AntBatch, start_ants
from metacontroller.domains.ant_pinpad.symmetry import turn_torques
from metacontroller.domains.base import FREE
from metacontroller.domains.pinpad.tasks import A2_POST, TABLE_A2, transitions
from metacontroller.models.config import ModelConfig
from metacontroller.models.encoders import VectorEncoder
from metacontroller.presets import preset, preset_names
from metacontroller.presets.ant import PRESETS
from metacontroller.recipes.config import from_json, to_json
from metacontroller.storage.run_folder import RunFolder


def random_state(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(folder: Path, **changes: Any) -> AntPinpadConfig:
    config = preset("ant-debug").domain
    return replace(config, dataset=str(folder / "data"), episodes=16, max_steps=6, **changes)


# -- without MuJoCo ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    assert f"ant-{name}" in preset_names()
    config = preset(f"ant-{name}")
    assert isinstance(config.domain, AntPinpadConfig)
    assert config.model.body == "hawk"
    assert config.meta_controller.rank is None
    assert from_json(json.loads(json.dumps(to_json(config), default=dataclasses.asdict))) == config


@pytest.mark.parametrize("name", ["short", "laptop", "paper"])
def test_no_transition_of_the_post_training_task_is_demonstrated(name: str) -> None:
    config = preset(f"ant-{name}").domain
    assert transitions([config.post_task])
    assert not transitions(config.tasks) & transitions([config.post_task])


def test_the_world_says_what_a_model_has_to_know() -> None:
    world = AntPinpad(AntPinpadConfig())
    spec = world.spec()
    plane = {"dim_state": 41, "size": 4, "objects": 5}
    assert (spec.encoder, spec.action) == ({"plane": plane}, {"num_continuous": 8})
    assert (spec.max_steps, spec.subgoals) == (500, ("0", "1", "2", "3"))
    seen = world.seen_transitions()
    assert not bool(seen[0, 1] | seen[1, 2] | seen[2, 3])
    assert bool(seen.diagonal().all())
    assert int(seen.sum()) == 4 + 8
    assert world.format_task() == "0-1-2-3"
    assert world.format_task(FREE) == "free"
    assert world.format_task(world.parse_task("2-0")) == "2-0"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": ((0, 7),)}, "task 0-7 has unknown color 7"),
        ({"size": 2}, "too few for 4 colors"),
        ({"episodes": 0}, "episodes is 0; expected at least 1"),
        ({"threads": -1}, "threads is -1; expected at least 0"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AntPinpadConfig(**changes)


def test_without_mujoco_acting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mujoco"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for name in ("engine", "rendering"):
        monkeypatch.delitem(sys.modules, f"{ant_pinpad.__name__}.{name}", raising=False)
        monkeypatch.delattr(ant_pinpad, name, raising=False)
    simulator._physics.cache_clear()
    world = AntPinpad(AntPinpadConfig(max_steps=3))
    env = world.reset(2, random_state())
    with pytest.raises(ValueError, match=r"mujoco is not installed; install it by: pip install .*\[ant\]"):
        env.step(torch.zeros(2, 8))
    assert not world.offers("render")


def test_an_expert_that_is_not_there_is_named(tmp_path: Path) -> None:
    world = AntPinpad(small(tmp_path, expert=str(tmp_path / "mine.safetensors")))
    with pytest.raises(ValueError, match=r"there is no expert in .*mine\.safetensors; train one with"):
        world.demonstrations("pretrain", 2, random_state())


# -- with MuJoCo ------------------------------------------------------------------------------------------------------

needs_mujoco = pytest.mark.skipif(domain_module.versions() == {}, reason="the extra ant is not installed")


@needs_mujoco
def test_demonstrations_come_from_disk_one_dataset_a_phase(tmp_path: Path) -> None:
    world = AntPinpad(small(tmp_path))
    first = world.demonstrations("discover", 20, random_state(3))
    assert first.states.shape == (20, first.steps + 1, world.spec().encoder["plane"]["dim_state"])
    again = AntPinpad(small(tmp_path)).demonstrations("discover", 20, random_state(3))
    assert torch.equal(first.states, again.states)
    sampled = world.demonstrations("pretrain", 20, random_state(3))
    assert len(list((tmp_path / "data").iterdir())) == 2
    # an untrained expert's mean torques are small, and its samples fill the range
    assert float(first.actions.abs().mean()) < 0.5 < float(sampled.actions.abs().mean()) + 0.1
    assert float(sampled.actions.abs().max()) == 1.0


@needs_mujoco
def test_demonstrations_are_walks_in_turned_worlds_with_other_colors(tmp_path: Path) -> None:
    """Each is on disk as it is drawn or turned, and the ant of the turned world does as it says, for a task of the
    list. Colors are counted on where the tasks allow it."""
    tasks = ((0, 1), (2, 0), (1, 2))
    one, world = (AntPinpad(small(tmp_path, num_colors=3, tasks=each)) for each in (tasks[:2], tasks))
    episodes = world.demonstrations("pretrain", 40, random_state(3))
    env = world.restart(episodes)
    for step in range(2):
        env.step(episodes.actions[:, step])
        expected = episodes.states[:, step + 1]
        assert torch.allclose(env.observation[expected.any(1)], expected[expected.any(1)], atol=5e-3)
    store = world.store("pretrain")
    held = store.read(torch.arange(len(store)))
    places = [states[:, 0, 27:29].abs().sort(-1).values for states in (episodes.states, held.states)]
    assert float(torch.cdist(places[0], places[1]).amin(1).max()) < 1e-3
    as_drawn = torch.cdist(episodes.states[:, 0, 27:29], held.states[:, 0, 27:29]).amin(1) < 1e-3
    assert 0.1 < float(as_drawn.float().mean()) < 0.5

    again = one.demonstrations("pretrain", 40, random_state(3))
    assert episodes.subgoals is not None
    assert again.subgoals is not None
    assert set(again.subgoals[:, 0].tolist()) == {0, 2}  # its tasks allow no other colors
    assert set(episodes.subgoals[:, 0].tolist()) == {0, 1, 2}


@needs_mujoco
def test_turned_demonstrations_and_tables_of_cells_are_asked_for(tmp_path: Path) -> None:
    config = replace(small(tmp_path), symmetry_augmentation=False, encoder="linear")
    drawn = AntPinpad(config).demonstrations("pretrain", 6, random_state())
    stored = AntPinpad(config).store("pretrain").read(torch.randint(config.episodes, (6,), generator=random_state()))
    assert torch.equal(drawn.states, stored.states)
    assert torch.equal(drawn.actions, stored.actions)
    turned = AntPinpad(small(tmp_path)).demonstrations("pretrain", 6, random_state())
    assert not torch.equal(turned.states, stored.states)
    spec = AntPinpad(config).spec()
    assert spec.encoder == {"num_continuous": 41}
    model = ModelConfig(dim=8, lower_depth=0, upper_depth=1, heads=2, mlp_dim=8).build(spec.encoder, spec.action)
    assert type(model.encoder) is VectorEncoder


@needs_mujoco
def test_an_episode_can_be_begun_anew(tmp_path: Path) -> None:
    world = AntPinpad(small(tmp_path))
    episodes = world.demonstrate((2, 0), 6, random_state())
    env = world.restart(episodes)
    assert torch.allclose(env.observation, episodes.states[:, 0], atol=1e-5)
    assert env.goal().tolist() == [2] * 6
    assert env.task_lengths.tolist() == [1] * 6  # of the task, the labels tell the part that was begun
    env.step(episodes.actions[:, 0])
    assert torch.allclose(env.observation, episodes.states[:, 1], atol=1e-3)


@needs_mujoco
def test_facts_are_where_the_color_is_and_where_the_ant(tmp_path: Path) -> None:
    world = AntPinpad(small(tmp_path))
    env = world.reset(12, random_state(), task=(1, 3))
    objects, cell = env.objects, env.cell
    facts = world.facts(world.demonstrate((1, 3), 12, random_state(5)))
    assert {name: value.dtype for name, value in facts.items()} == dict.fromkeys(
        ("color", "place", "cell", "way"), torch.int64
    )
    assert set(facts["color"].flatten().tolist()) <= {-1, 1}
    episodes = world.demonstrate((1, 3), 12, random_state())
    facts = world.facts(episodes)
    restarted = world.restart(episodes)
    assert torch.equal(facts["place"][:, 0], restarted.objects[:, 1])
    assert torch.equal(facts["cell"][:, 0], restarted.cell)
    assert int(facts["way"].max()) <= 3
    assert (objects.shape, cell.shape) == ((12, 5), (12,))


@needs_mujoco
def test_an_ant_may_decide_where_it_enters_a_cell(tmp_path: Path) -> None:
    world = AntPinpad(small(tmp_path))
    episodes = world.demonstrations("discover", 6, random_state())
    places = torch.tensor([[-0.5, -0.5], [-0.5, -0.4], [-0.2, -0.4], [-0.2, 0.5], [-0.5, 0.5], [-0.5, 0.5]])
    episodes.states[:, :6, 27:29] = places  # of 3 x 3 cells that end at a third
    arena = world.config.arena
    found = world.decisions(episodes)
    cells = arena.cell(episodes.states[:, :-1, 27:29].double() * arena.half)
    expected = torch.zeros_like(found)
    for row in range(6):
        for step in range(1, int(episodes.lengths[row])):
            expected[row, step] = cells[row, step] != cells[row, step - 1]
    assert torch.equal(found, expected)
    assert bool(found.any())


@needs_mujoco
def test_a_free_episode_does_not_end_for_a_color(tmp_path: Path) -> None:
    batch = AntPinpad(small(tmp_path)).reset(8, random_state(), task=FREE, max_steps=4)
    for _ in range(4):
        assert not bool(batch.step(torch.zeros(8, 8)).any())
    assert batch.truncated.tolist() == [True] * 8
    assert batch.goal().tolist() == [-1] * 8
    assert not bool(batch.success.any())


@needs_mujoco
def test_pictures_are_of_the_states(tmp_path: Path) -> None:
    world = AntPinpad(small(tmp_path))
    if not world.offers("render"):
        pytest.skip("this machine has no OpenGL to draw with")
    pictures = world.render(world.demonstrate((0,), 1, random_state()).states[0, ::3])
    assert pictures.dtype == torch.uint8
    assert pictures.shape[1:] == (224, 224, 3)
    assert not torch.equal(pictures[0], pictures[-1])


@needs_mujoco
@pytest.mark.slow
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["pretrain a --preset ant-debug", "discover a", "internal-rl a", "internal-rl a --raw"]
    lines += ["evaluate a --policy internal-rl --episodes 8", "gate a --episodes 8", "probe a --steps 3 --episodes 8"]
    lines += ["steer a --steps 2 --episodes 8 --batch-size 8", "inject a --walks 4", "oracle a --episodes 8"]
    lines += ["episodes a --episodes 2", "reproduce --preset ant-debug --out b"]
    for line in lines:
        assert main([*line.split(), "--device", "cpu"]) == 0, line
    run = RunFolder("a")
    for name in ("pretrain", "discover", "internal_rl"):
        assert run.load_checkpoint(name)[1]["versions"] == domain_module.versions()
    run.versions = {"mujoco": "0.9"}
    with pytest.warns(UserWarning, match=r"pretrain.safetensors was made with mujoco .* and 0\.9 is installed"):
        run.load_checkpoint("pretrain")


@needs_mujoco
def test_the_shipped_expert_solves_most_tasks() -> None:
    world, generator = AntPinpad(AntPinpadConfig(threads=1)), random_state()
    env = start_ants(world.config.arena, [*TABLE_A2, A2_POST], generator, 1)
    expert, about = Expert.load(domain_module.SHIPPED_EXPERT)
    episodes = play(env, expert, None)
    assert about["arena"].items() <= vars(world.config.arena).items()
    assert float(env.success.float().mean()) > 0.7
    assert int(episodes.lengths[env.success].min()) > 20


@needs_mujoco
def test_an_expert_of_another_version_of_mujoco_warns(tmp_path: Path) -> None:
    path = tmp_path / "expert.safetensors"
    Expert.untrained().save(path, {"versions": {**domain_module.versions(), "mujoco": "0.9"}})
    with pytest.warns(UserWarning, match=r"expert\.safetensors was made with mujoco 0\.9 and .* is installed"):
        AntPinpad(small(tmp_path, expert=str(path))).demonstrate(None, 1, random_state())
    _, about = Expert.load(domain_module.SHIPPED_EXPERT)
    assert about["versions"]["mujoco"] == "4.0.0"


@needs_mujoco
def test_an_expert_of_other_cells_warns(tmp_path: Path) -> None:
    config = AntPinpadConfig(cell_size=2.5, threads=1, max_steps=3, dataset=str(tmp_path), only_successes=False)
    with pytest.warns(UserWarning, match=r"learned on cells of 1\.5 m and cell_size is 2\.5"):
        AntPinpad(config).demonstrate(None, 1, random_state())


@needs_mujoco
def test_augmented_episodes_are_those_of_a_turned_world_and_keep_the_yaw() -> None:
    """Played again in the turned world with torques renamed alike, the ant does what the augmented episode shows."""
    world = AntPinpad(AntPinpadConfig(threads=1, start_yaw=math.pi / 4))
    env = start_ants(world.config.arena, [()] * 12, random_state(), 1)
    seen, actions = [env.observation], [0.5 * torch.randn(12, 8, generator=random_state()) for _ in range(4)]
    for action in actions:
        env.step(action)
        seen.append(env.observation)
    episode = torch.stack(seen, 1).double()
    quarter = torch.randint(4, (12,), generator=random_state())
    assert len(quarter.unique()) == 4
    shown = world.augment(episode, random_state())
    arena, first = world.config.arena, (episode[:, 0], shown[:, 0])
    before, after = (heading(parts_of(arena, states).proprioception[:, ORIENTATION]) for states in first)
    assert torch.allclose(before, after, atol=1e-5)
    assert bool((shown[:, 0, ORIENTATION.start] > 0.5).all())  # a quaternion has two signs, and starts with this one
    state, nothing = state_of(arena, shown[:, 0]), torch.zeros(12, dtype=torch.long)
    assert torch.equal((state - state_of(arena, episode[:, 0]))[:, :2].abs().amax(1) > 0.3, quarter > 0)
    again = AntBatch(arena, objects_of(arena, shown[:, 0]), state, nothing[:, None] - 1, nothing, 1)
    for action in actions:
        again.step(turn_torques(action, -quarter % 4))
    assert torch.allclose(again.state, state_of(arena, shown[:, -1]), atol=1e-3, rtol=1e-3)
