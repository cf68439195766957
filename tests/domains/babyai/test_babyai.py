"""The rooms against minigrid itself, the bot's episodes and labels, missions, and the dataset on disk."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.utils.baby_ai_bot import BabyAIBot
from torch import Tensor

from metacontroller import InternalVectorEnv
from metacontroller.domains import babyai
from metacontroller.domains.babyai import domain as domain_module
from metacontroller.domains.babyai import engine, observation
from metacontroller.domains.babyai.batch import DROP, FORWARD, LEFT, PICKUP, RoomBatch
from metacontroller.domains.babyai.dataset import Recipe, RoomBot, generate
from metacontroller.domains.babyai.domain import BabyAI, BabyAIConfig, Told
from metacontroller.domains.babyai.level import Room
from metacontroller.domains.base import FREE, BatchedEnv
from metacontroller.domains.pinpad import worlds
from metacontroller.phases.rollout import prior_proposal, rollout_abstract
from metacontroller.presets import preset
from metacontroller.recipes.config import build_meta_controller, build_model

OBJECTS = tuple(observation.names_of(BabyAIConfig().objects))
LENGTH = BabyAIConfig().mission_length


def rooms(count: int, task: tuple[int, ...] = (0, 1, 2), size: int = 8, max_steps: int = 64) -> list[Room]:
    made = [Room(OBJECTS, task, size=size, max_steps=max_steps) for _ in range(count)]
    for seed, room in enumerate(made):
        room.reset(seed=seed)
    return made


def small(tmp_path: Path, **changes: Any) -> BabyAIConfig:
    options = {"room_size": 6, "max_steps": 48, "episodes": 60, "workers": 1, "dataset": str(tmp_path / "data")}
    return BabyAIConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for demonstrations that several tests read."""
    return tmp_path_factory.mktemp("babyai")


def random_state(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def suggestion(bot: BabyAIBot, action: int | None = None) -> int:
    """What a bot suggests after an action."""
    suggested = bot.replan(action)
    assert suggested is not None
    return int(suggested)


def bot_actions(bots: list[BabyAIBot], actions: Tensor | None, running: Tensor) -> Tensor:
    """What each bot suggests after ``actions``; left for rows that have ended."""
    taken = [None] * len(bots) if actions is None else actions.tolist()
    suggested = [suggestion(bot, last) if run else LEFT for bot, last, run in zip(bots, taken, running, strict=True)]
    return torch.tensor(suggested)


@pytest.mark.parametrize("size", [5, 6, 8, 11])
def test_observations_are_minigrids(size: int) -> None:
    """Along random walks that also move objects, the view that minigrid computes cell by cell."""
    count, random = 6, random_state()
    batch = RoomBatch(rooms(count, task=(), size=size, max_steps=60), mission_length=LENGTH)
    moved = 0
    for _ in range(60):
        for row, room in enumerate(batch.rooms):
            truth = RoomGridLevel.gen_obs(room)
            seen = batch.observation[row].numpy()
            assert np.array_equal(seen[: observation.VIEW_CELLS], observation.image_symbols(truth["image"]).ravel())
            assert np.array_equal(
                observation.symbols_image(seen[: observation.VIEW_CELLS]), truth["image"].reshape(-1, 3)
            )
            assert seen[observation.VIEW_CELLS] == truth["direction"]
        before = [room.carried for room in batch.rooms]
        batch.step(torch.randint(5, (count,), generator=random))
        now = [room.carried for room in batch.rooms]
        moved += sum(a >= 0 > b for a, b in zip(before, now, strict=True))
        assert batch.reached().tolist() == [b if a < 0 <= b else -1 for a, b in zip(before, now, strict=True)]
    assert moved > 5 or size == 11  # objects were put down elsewhere
    assert bool(batch.truncated.all())
    assert not bool(batch.terminated.any() | batch.success.any())


def test_episodes_are_minigrids() -> None:
    """The bots of minigrid play the batch: rewards, endings, success, steps and subgoals as a single level has them."""
    single, batch = rooms(12, max_steps=30), RoomBatch(rooms(12, max_steps=30), mission_length=LENGTH)
    bots: list[BabyAIBot] = [BabyAIBot(room) for room in batch.rooms]
    actions, running = None, torch.ones(12, dtype=torch.bool)
    while bool(running.any()):
        actions = bot_actions(bots, actions, running)
        if int(batch.steps.max()) == 10:
            actions[0] = PICKUP  # perhaps in vain, and at worst a failure
        rewards = batch.step(actions)
        for row in running.nonzero()[:, 0].tolist():
            _, reward, ended, truncated, _ = single[row].step(int(actions[row]))
            assert float(rewards[row]) == pytest.approx(reward)
            assert (bool(batch.terminated[row]), bool(batch.success[row])) == (ended, reward > 0)
            assert bool(batch.truncated[row]) == (truncated and not ended)
        assert not bool(rewards[~running].any())
        running = ~(batch.terminated | batch.truncated)
    assert int(batch.success.sum()) >= 8
    assert torch.equal(batch.subgoals_done[batch.success], torch.full((int(batch.success.sum()),), 3))
    assert torch.equal(batch.goal()[batch.success], torch.full((int(batch.success.sum()),), -1))
    assert batch.steps.tolist() == [room.step_count for room in single]


def test_pictures_are_minigrids() -> None:
    """Along random walks that also move objects, what minigrid draws of what the agent sees."""
    count, random = 4, random_state()
    batch = RoomBatch(rooms(count, task=(), max_steps=40), mission_length=LENGTH, tiles=engine.tiles())
    carried = 0
    for _ in range(40):
        for row, room in enumerate(batch.rooms):
            truth = room.get_pov_render(observation.TILE)
            seen = batch.observation[row, : observation.PIXELS].view(observation.PICTURE).numpy()
            assert np.array_equal(seen, truth)
            assert batch.observation[row, observation.PIXELS] == room.agent_dir
            carried += room.carrying is not None
        batch.step(torch.randint(5, (count,), generator=random))
    assert carried > 3
    assert batch.observation.dtype == torch.uint8


def test_a_world_of_pictures_says_what_one_of_symbols_does(shared: Path) -> None:
    config = preset("babyai-debug")
    worlds = {view: BabyAI(small(shared, view=view)) for view in ("symbols", "rgb")}
    episodes = {view: world.demonstrations("pretrain", 6, random_state()) for view, world in worlds.items()}
    symbols, seen = episodes["symbols"].states, episodes["rgb"].states
    assert torch.equal(seen[..., observation.PIXELS :].long(), symbols[..., observation.VIEW_CELLS :])
    drawn = observation.pictures(symbols[..., : observation.VIEW_CELLS].numpy(), engine.tiles())
    assert np.array_equal(worlds["rgb"].render(seen[0]).numpy(), drawn[0])
    mirrored = {view: world.augment(episodes[view].states, random_state(5)) for view, world in worlds.items()}
    expected = observation.with_pictures(mirrored["symbols"].numpy(), engine.tiles())
    assert np.array_equal(mirrored["rgb"].numpy(), expected)
    assert not torch.equal(mirrored["rgb"], seen)
    config = replace(config, domain=worlds["rgb"].config)
    model, steering = build_model(config), build_meta_controller(config)
    batch = episodes["rgb"]
    model.behavior_cloning_loss(batch.states, batch.actions, batch.lengths).action.backward()
    assert all(value.grad is not None for value in model.encoder.parameters())
    env = worlds["rgb"].reset(3, random_state(), max_steps=5)
    rollout = rollout_abstract(model.eval(), steering.eval(), env, prior_proposal(steering, random_state()))
    assert rollout.steps.max() == 5


def walk_to(batch: RoomBatch, target: int) -> None:
    """Brings a batch of one room before an object, and picks it up."""
    helper = Room(OBJECTS, (target,), size=8, max_steps=1000)
    helper.reset(seed=0)
    for name in ("agent_pos", "agent_dir", "grid", "carrying"):
        setattr(helper, name, getattr(batch.rooms[0], name))
    helper.instrs.reset_verifier(helper)
    bot = RoomBot(helper)
    action = suggestion(bot)
    while True:
        batch.step(torch.tensor([action]))
        helper.agent_pos, helper.agent_dir = batch.rooms[0].agent_pos, batch.rooms[0].agent_dir
        if action == PICKUP:
            return
        action = suggestion(bot, action)


def test_only_the_whole_task_in_order_is_rewarded_and_a_wrong_object_ends_it() -> None:
    batch = RoomBatch(rooms(1, task=(1, 3)), mission_length=LENGTH)
    assert batch.goal().tolist() == [1]
    walk_to(batch, 1)
    assert (batch.subgoals_done.tolist(), batch.goal().tolist(), batch.reached().tolist()) == ([1], [3], [1])
    assert not bool(batch.terminated)
    batch.step(torch.tensor([DROP]))
    assert batch.reached().tolist() == [-1]
    walk_to(batch, 0)
    assert bool(batch.terminated)
    assert not bool(batch.success)
    assert batch.step(torch.tensor([FORWARD])).tolist() == [0.0]
    batch = RoomBatch(rooms(1, task=(1, 3)), mission_length=LENGTH)
    walk_to(batch, 1)
    batch.step(torch.tensor([DROP]))
    walk_to(batch, 3)
    assert bool(batch.success)


def test_a_task_may_name_an_object_twice() -> None:
    batch = RoomBatch(rooms(1, task=(0, 2, 0)), mission_length=LENGTH)
    for target in (0, 2):
        walk_to(batch, target)
        batch.step(torch.tensor([DROP]))
    walk_to(batch, 0)
    assert bool(batch.success)


def test_rows_are_kept_in_the_order_asked_for() -> None:
    batch = RoomBatch(rooms(5), mission_length=LENGTH)
    batch.step(torch.full((5,), FORWARD))
    before = batch.observation
    batch.select(torch.tensor([4, 1]))
    assert isinstance(batch, BatchedEnv)
    assert torch.equal(batch.observation, before[[4, 1]])
    batch.step(torch.tensor([LEFT, LEFT]))
    assert len(batch) == 2
    assert torch.equal(batch.observation[:, observation.VIEW_CELLS], (before[[4, 1], observation.VIEW_CELLS] - 1) % 4)


def test_rows_are_replaced_one_by_one() -> None:
    batch, other = RoomBatch(rooms(4), mission_length=LENGTH), RoomBatch(rooms(6)[4:], mission_length=LENGTH)
    actions = torch.full((4,), FORWARD)
    batch.step(actions)
    taken = copy(batch)
    taken.select(torch.tensor([0, 3]))
    taken.step(torch.tensor([LEFT, PICKUP]))
    before = batch.observation
    kept = before.clone()
    batch.replace(torch.tensor([3, 1]), other)
    assert torch.equal(before, kept)  # what was read does not change
    assert torch.equal(batch.observation, torch.stack([kept[0], other.observation[1], kept[2], other.observation[0]]))
    assert batch.steps.tolist() == [1, 0, 1, 0]
    batch.replace(torch.tensor([0]), one_of(taken, 0))
    batch.step(actions)
    for row, room in enumerate(batch.rooms):
        truth = RoomGridLevel.gen_obs(room)
        seen = batch.observation[row, : observation.VIEW_CELLS].numpy()
        assert np.array_equal(seen, observation.image_symbols(truth["image"]).ravel())
        assert int(batch.steps[row]) == room.step_count


def one_of(batch: RoomBatch, row: int) -> RoomBatch:
    chosen = copy(batch)
    chosen.select(torch.tensor([row]))
    return chosen


def test_internal_rl_as_a_vector_environment_plays_all_rooms_together(tmp_path: Path) -> None:
    config = preset("babyai-debug")
    config = replace(config, domain=small(tmp_path, post_task=(0,), max_steps=9))
    domain = BabyAI(config.domain)
    envs = InternalVectorEnv(domain, build_model(config), build_meta_controller(config), 5)
    envs.reset(seed=0)
    counts: set[int] = set()
    for _ in range(12):
        *_, terminated, truncated, info = envs.step(envs.sample_prior())
        for row in (terminated | truncated).nonzero()[0]:
            counts.add(int(info["final_info"]["episode_steps"][row]))
    assert isinstance(envs._rows.env, RoomBatch)  # type: ignore[union-attr]
    assert max(counts) == 9
    copied = pickle.loads(pickle.dumps(envs))  # noqa: S301
    codes = envs.sample_prior()
    np.testing.assert_array_equal(envs.step(codes)[0], copied.step(codes)[0])


# -- the bot ----------------------------------------------------------------------------------------------------------


def test_the_faster_bot_does_what_minigrids_does() -> None:
    for slow_room, fast_room in zip(rooms(8), rooms(8), strict=True):
        slow, fast, action, ended = BabyAIBot(slow_room), RoomBot(fast_room), None, False
        while not ended:
            suggested = slow.replan(action)
            assert fast.replan(action) == suggested
            action = suggested
            slow_room.step(action)
            ended = fast_room.step(action)[2]


def recipe(**changes: Any) -> Recipe:
    options = {"objects": OBJECTS, "tasks": ((0, 1, 2), (3, 0)), "room_size": 8, "max_steps": 64, "epsilon": 0.1}
    return Recipe(**{**options, "mission_length": LENGTH, "seed": 0, **changes})


def test_labels_are_the_bots_stack_and_change_when_an_object_is_put_down() -> None:
    made = generate(recipe(epsilon=0.0), 30)
    for row in range(made.batch):
        length = int(made.lengths[row])
        actions, segments = made.actions[row, :length].tolist(), made.segments[row, :length].tolist()  # type: ignore
        expected, done = [], 0
        for action in actions:
            expected.append(done)
            done += action == DROP
        assert segments == expected
        assert actions[-1] == PICKUP
    subgoals = made.subgoals[made.mask()]  # type: ignore
    assert set(subgoals.tolist()) == {0, 1, 2, 3}
    assert made.actions[~made.mask()].unique().tolist() == [0]


def test_only_successful_episodes_are_kept() -> None:
    noisy = generate(recipe(tasks=((0, 1),), epsilon=0.3, max_steps=30), 40)
    clean = generate(recipe(tasks=((0, 1),), epsilon=0.0), 40)
    assert noisy.lengths.float().mean() > clean.lengths.float().mean()
    assert int(noisy.lengths.max()) <= 30
    assert noisy.actions.gather(1, noisy.lengths[:, None] - 1).unique().tolist() == [PICKUP]


def test_demonstrations_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("metacontroller.domains.babyai.dataset.CHUNK", 5)
    alone, together = generate(recipe(workers=1), 10), generate(recipe(workers=2), 10)
    for name in ("states", "actions", "lengths", "segments"):
        assert torch.equal(getattr(alone, name), getattr(together, name))


# -- the world --------------------------------------------------------------------------------------------------------


def test_the_mission_is_shown_in_a_share_of_pretraining_and_never_later(shared: Path) -> None:
    world = BabyAI(small(shared, mission_share=0.5))
    first, random = observation.VIEW_CELLS + 1, random_state()
    shown = world.demonstrations("pretrain", 400, random).states[:, :, first:]
    share = (shown[:, 0, 0] > 0).float().mean()
    assert 0.4 < share < 0.6
    assert torch.equal(shown, shown[:, :1].expand_as(shown))
    assert not bool(world.demonstrations("discover", 50, random).states[:, :, first:].any())
    assert not bool(world.reset(4, random).observation[:, first:].any())
    told = world.reset(4, random, task=Told((0, 1))).observation[:, first:]
    words = [observation.WORDS[word - 1] for word in told[0].tolist() if word]
    assert " ".join(words) == "pick up the red ball then pick up the green key"


def test_demonstrations_come_from_disk_the_same_for_every_run(tmp_path: Path, monkeypatch: Any) -> None:
    world = BabyAI(small(tmp_path))
    first = world.demonstrations("discover", 20, random_state(3))
    worlds._open.cache_clear()
    monkeypatch.setattr("metacontroller.domains.babyai.dataset.generate", lambda *_: pytest.fail("made again"))
    again = BabyAI(small(tmp_path)).demonstrations("discover", 20, random_state(3))
    assert torch.equal(first.states, again.states)
    assert len(list((tmp_path / "data").iterdir())) == 1
    assert world.versions() == world.store("discover").meta["versions"]
    assert world.versions()["minigrid"] == metadata.version("minigrid")
    monkeypatch.setattr(BabyAI, "versions", lambda self: {"minigrid": "0.9"})
    worlds._open.cache_clear()
    with pytest.warns(UserWarning, match=r"was made with minigrid .* and 0\.9 is installed"):
        world.demonstrations("discover", 2, random_state())


def test_demonstrations_can_be_played_anew(shared: Path) -> None:
    for view in ("symbols", "rgb"):
        world = BabyAI(small(shared, view=view))
        made = [world.demonstrations("pretrain", 12, random_state()), world.demonstrate(None, 3, random_state())]
        for episodes in made:
            env = world.restart(episodes)
            for step in range(episodes.steps):
                assert torch.equal(env.observation, episodes.states[:, step])
                env.step(episodes.actions[:, step])
            assert bool(env.success.all())
            assert torch.equal(env.steps, episodes.lengths)
    with pytest.raises(ValueError, match="no labels or no seeds"):
        world.restart(replace(episodes, seeds=None))


def test_a_mission_longer_than_the_model_reads_is_played_and_never_shown(tmp_path: Path) -> None:
    world = BabyAI(small(tmp_path, post_task=(0, 1, 2, 0, 1), max_steps=96))
    episodes = world.demonstrate(None, 3, random_state())
    assert episodes.segments is not None
    assert episodes.segments.amax(1).tolist() == [4] * 3
    assert not bool(episodes.states[..., -LENGTH:].any())
    env = world.reset(2, random_state())
    assert env.observation.shape[1:] == episodes.states.shape[2:]
    with pytest.raises(ValueError, match="task 0-1-2-0-1 is told in 29 words and the model reads 23"):
        world.reset(2, random_state(), task=Told((0, 1, 2, 0, 1)))


def test_the_easiest_episodes_are_the_shortest(shared: Path) -> None:
    every = BabyAI(small(shared)).demonstrations("discover", 300, random_state())
    easy = BabyAI(small(shared, easiest=0.25)).demonstrations("discover", 300, random_state())
    assert int(easy.lengths.max()) < int(every.lengths.max())
    assert int(easy.lengths.min()) == int(every.lengths.min())


def test_a_free_episode_ends_at_the_limit_alone(tmp_path: Path) -> None:
    batch = BabyAI(small(tmp_path)).reset(8, random_state(), task=FREE, max_steps=40)
    random = random_state(1)
    reached = torch.zeros(8, dtype=torch.bool)
    while not bool(batch.truncated.all()):
        assert not bool(batch.step(torch.randint(5, (8,), generator=random)).any())
        reached |= batch.reached() >= 0
    assert batch.steps.tolist() == [40] * 8
    assert bool(reached.any())


def test_a_symmetry_turns_and_mirrors_what_the_room_looks_like() -> None:
    """A room and its mirror image or turn, walked through by mirrored actions, look alike under one symmetry."""
    room = rooms(1)[0]
    twin = rooms(1)[0]
    width = room.width
    for x in range(width):
        for y in range(width):
            twin.grid.set(width - 1 - x, y, room.grid.get(x, y))
    twin.agent_pos, twin.agent_dir = (width - 1 - room.agent_pos[0], room.agent_pos[1]), (2 - room.agent_dir) % 4
    batch = RoomBatch([room, twin], mission_length=LENGTH)
    original = batch.observation[:1, None].expand(200, -1, -1)
    images = {tuple(row) for row in observation.random_symmetry(original, random_state())[:, 0].tolist()}
    assert tuple(batch.observation[1].tolist()) in images
    assert tuple(batch.observation[0].tolist()) in images
    turned = batch.observation[0].clone()
    turned[observation.VIEW_CELLS] = (turned[observation.VIEW_CELLS] + 1) % 4
    assert tuple(turned.tolist()) in images
    assert len(images) <= 8


def test_pictures_have_a_cell_for_each_of_the_view(tmp_path: Path) -> None:
    world = BabyAI(small(tmp_path))
    pictures = world.render(world.demonstrate((0,), 1, random_state()).states[0])
    assert pictures.dtype == torch.uint8
    assert pictures.shape[1:] == (7 * 16, 7 * 16, 3)
    assert len(pictures.flatten(1).unique(dim=0)) > 1


def test_tasks_are_read_and_written(tmp_path: Path) -> None:
    world = BabyAI(small(tmp_path))
    assert world.format_task() == "0-1-2-3"
    for text in ("0-1", "told:2-0"):
        assert world.format_task(world.parse_task(text)) == text
    seen = world.seen_transitions()
    assert not bool(seen[0, 1] | seen[1, 2] | seen[2, 3])
    assert bool(seen[0, 3])


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objects": ("red dog",)}, "object 'red dog' is unknown; write a color"),
        ({"objects": ("red ball",) * 4}, "expected no two alike"),
        ({"tasks": ((0, 7),)}, "task 0-7 has unknown color 7.*add to domain.objects"),
        ({"room_size": 3}, "room_size is 3; expected at least 5"),
        ({"mission_share": 2.0}, "mission_share is 2.0; expected a share"),
        ({"easiest": 0.0}, "easiest is 0.0; expected a share above 0"),
        ({"mission_length": 16}, "mission_length is 16; expected at least 17, the words of 0-3-2"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BabyAIConfig(**changes)


def test_a_bot_that_cannot_succeed_says_what_to_change() -> None:
    with pytest.raises(ValueError, match="the bot failed 100 times at task 0-1-2; raise max_steps"):
        generate(recipe(tasks=((0, 1, 2),), max_steps=3), 1)


def test_words_that_no_mission_has_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown word 'fetch'"):
        observation.mission_words("fetch the ball", LENGTH)
    with pytest.raises(ValueError, match="has 3 words; the model reads 2"):
        observation.mission_words("pick up the", 2)


@pytest.fixture
def _without_minigrid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.startswith("minigrid")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "minigrid", None)
    monkeypatch.delitem(sys.modules, f"{babyai.__name__}.engine", raising=False)
    monkeypatch.delattr(babyai, "engine", raising=False)
    domain_module._minigrid.cache_clear()
    yield
    domain_module._minigrid.cache_clear()


@pytest.mark.usefixtures("_without_minigrid")
def test_without_minigrid_the_config_is_read_and_acting_says_what_to_install() -> None:
    world = BabyAI(replace(BabyAIConfig(), episodes=5))
    assert world.spec().max_steps == 64
    with pytest.raises(ValueError, match=r"minigrid is not installed; install it by: pip install .*babyai"):
        world.reset(1, random_state())
