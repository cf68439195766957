"""The split for validation: no phase trains on its episodes, in any world, and all held-out figures read it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from metacontroller.analysis.episodes import Episodes
from metacontroller.analysis.gate_alignment import Gate, held_out_gate
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.oracle import Oracle
from metacontroller.analysis.probing import Probes
from metacontroller.analysis.steering import Steering
from metacontroller.data.batching import EpisodeStream, apart
from metacontroller.data.datasets import Dataset
from metacontroller.data.trajectories import Episodes as Store
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.ant_pinpad.domain import AntPinpad
from metacontroller.domains.babyai.domain import BabyAI, BabyAIConfig
from metacontroller.domains.base import demonstrations
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig
from metacontroller.domains.offline.domain import Offline, OfflineConfig
from metacontroller.phases import diagnostics
from metacontroller.presets import preset
from metacontroller.presets.gridworld import debug
from metacontroller.recipes import measure
from metacontroller.recipes.config import (
    ExperimentConfig,
    build_meta_controller,
    build_model,
    load_run,
    to_json,
    with_seed,
)
from metacontroller.recipes.run_phase import run_discover
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import STREAMS, noise_generator, stream_seed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contents(episodes: Trajectories) -> set[Any]:
    """Each episode as its states and actions."""
    return {
        (episodes.states[row, : length + 1].numpy().tobytes(), episodes.actions[row, :length].numpy().tobytes())
        for row, length in enumerate(episodes.lengths.tolist())
    }


def shared(held_out: Trajectories, *trained_on: Trajectories) -> int:
    """How many episodes held out are, in states and actions, among those trained on."""
    return len(contents(held_out) & set().union(*map(contents, trained_on)))


# -- worlds -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("minigrid") is None, reason="the extra babyai is not installed")
def test_no_episode_held_out_in_babyai_is_in_a_store_of_a_phase(tmp_path: Path) -> None:
    config = BabyAIConfig(
        room_size=8, episodes=40, epsilon=0.0, mission_share=0.0, workers=1, dataset=str(tmp_path / "data")
    )
    world = BabyAI(config)
    held_out, first, second = (world.store(split) for split in ("validation", "pretrain", "discover"))
    assert min(held_out.arrays["seeds"]) >= 2**31 > max(*first.arrays["seeds"], *second.arrays["seeds"])
    drawn = world.demonstrations("validation", 200, generator())
    assert len(contents(drawn)) > 30
    assert shared(drawn, *(world.demonstrations(split, 2000, generator()) for split in ("pretrain", "discover"))) == 0
    assert world.restart(drawn).observation.equal(drawn.states[:, 0])
    easy = BabyAI(replace(config, easiest=0.25)).demonstrations("validation", 200, generator())
    assert int(easy.lengths.max()) < int(drawn.lengths.max())


@pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="the extra ant is not installed")
def test_no_episode_held_out_on_the_ant_is_in_a_store_of_a_phase(tmp_path: Path) -> None:
    config = replace(preset("ant-debug").domain, dataset=str(tmp_path / "data"), episodes=16, max_steps=4)
    world = AntPinpad(config)
    drawn = world.demonstrations("validation", 100, generator())
    assert len(contents(drawn)) == 16
    stored = [world.store(split).read(torch.arange(16)) for split in ("pretrain", "discover")]
    assert (
        shared(drawn, *stored, *(world.demonstrations(split, 200, generator()) for split in ("pretrain", "discover")))
        == 0
    )


@pytest.mark.parametrize("copies", [1, 3])
def test_no_episode_held_out_of_own_data_is_trained_on(tmp_path: Path, copies: int) -> None:
    """Nor an equal one, where a dataset holds some several times."""
    rng = np.random.default_rng(0)
    made = [
        {"states": rng.normal(size=(steps + 1, 2)), "actions": rng.integers(2, size=steps)}
        for steps in rng.integers(1, 4, size=60)
    ]
    episodes = Store.of(Trajectories.from_episodes(made * copies))
    Dataset(episodes, spaces.Box(-9, 9, (2,), np.float32), spaces.Discrete(2)).write(tmp_path / "data")
    world = Offline(OfflineConfig(dataset=str(tmp_path / "data")))
    held_out, *trained_on = (
        world.demonstrations(split, 4000, generator(seed))
        for seed in (0, 1)
        for split in ("validation", "pretrain", "discover")
    )
    assert len(contents(held_out)) == 6
    assert len(contents(trained_on[0])) == 54
    assert contents(trained_on[0]) == contents(trained_on[1]) == contents(trained_on[3])
    assert contents(trained_on[2]) == contents(held_out)  # for every seed
    assert shared(held_out, trained_on[0]) == 0


def test_on_the_grid_the_same_seed_gives_other_episodes_for_validation() -> None:
    """Grids of 7 x 7 with eight colors and four walls; on small ones the same may be met by chance."""
    world = GridworldPinpad(GridworldPinpadConfig())
    drawn = world.demonstrations("validation", 256, generator(3))
    assert torch.equal(drawn.states, world.demonstrations("validation", 256, generator(3)).states)
    assert shared(drawn, *(world.demonstrations(split, 512, generator(3)) for split in ("pretrain", "discover"))) == 0


def test_validation_streams_are_none_of_training() -> None:
    """Also where a world knows nothing of the split and makes all its episodes alike."""

    class Alike(GridworldPinpad):
        def demonstrations(self, split: Any, n: int, generator: torch.Generator) -> Trajectories:
            return super().demonstrations("discover", n, generator)

    source = demonstrations(Alike(GridworldPinpadConfig()), "discover")
    held_out = demonstrations(Alike(GridworldPinpadConfig()), "validation")
    seed = stream_seed(5, "discover")
    trained_on = [source(64, generator(seed)), source(64, noise_generator(seed, torch.device("cpu")))]
    trained_on.append(EpisodeStream(source, 64, seed).next())
    for start in (generator(seed), noise_generator(seed, torch.device("cpu"))):
        assert shared(held_out(64, start), *trained_on) == 0
    used = {noise_generator(stream_seed(5, stream), torch.device("cpu")).initial_seed() for stream in STREAMS[1:]}
    used |= {stream_seed(5, stream) for stream in STREAMS}
    for start in range(200):
        found = apart(generator(start)).initial_seed()
        assert found >= 2**31
        assert found % 8 == 0
        assert found not in used


# -- what judges ------------------------------------------------------------------------------------------------------


class Recording(GridworldPinpad):
    """Notes which splits are asked for, and for how many episodes."""

    asked: list[tuple[str, int]]

    def demonstrations(self, split: Any, n: int, generator: torch.Generator) -> Trajectories:
        self.asked.append((split, n))
        return super().demonstrations(split, n, generator)


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., LoadedRun]:
    """A function that makes the run of a config, whose world notes what is asked of it."""

    def make(config: ExperimentConfig) -> LoadedRun:
        folder = RunFolder(tmp_path / "run")
        folder.write_config(to_json(config))
        build_model(config).save(folder.path / "base_model.safetensors")
        build_meta_controller(config).save(folder.path / "meta_controller.safetensors")
        world = Recording(config.domain)
        world.asked = []
        return replace(load_run(folder, "cpu"), domain=world)

    return make


def judged_by(run: LoadedRun, episodes: int) -> set[str]:
    """The splits of which just so many episodes were asked for."""
    world = run.domain
    assert isinstance(world, Recording)
    splits = {split for split, n in world.asked if n == episodes}
    world.asked.clear()
    return splits


def test_all_held_out_figures_read_the_validation_split(recorded: Callable[..., LoadedRun]) -> None:
    run = recorded(debug())
    held_out_gate(run, 13, 0)
    Gate().measure(run, Gate.Config(episodes=13))
    Episodes().measure(run, Episodes.Config(episodes=13))
    for analysis in (Probes, Steering):
        analysis().measure(run, analysis.Config(steps=1, batch_size=2, episodes=13), quiet=True)
    measure.measure_discovery(replace(run, settings=replace(run.settings, episodes=13)), reinforced=False)
    assert judged_by(run, 13) == {"validation"}
    Oracle().measure(run, Oracle.Config(episodes=13))
    assert judged_by(run, 13) == {"validation", "discover"}  # the reader of codes learns from the latter


def test_a_controller_is_judged_where_it_did_not_learn(recorded: Callable[..., LoadedRun]) -> None:
    """The action loss is the mean over the steps of validation episodes."""
    from metacontroller.analysis.steering import SupervisedControllers, _action_loss

    run = recorded(debug())
    episodes = run.demonstrations("validation")(7, generator())
    torch.manual_seed(0)
    controllers = SupervisedControllers(len(run.subgoals), run.base.dim, 2)
    torch.nn.init.normal_(controllers.write, std=0.1)
    total = 0.0
    for row in range(episodes.batch):
        one = episodes.index(torch.tensor([row]))
        assert one.subgoals is not None
        steered = controllers(run.base.residual(one.states, one.actions), one.subgoals)
        params = run.base.action_readout(run.base.upper(steered))
        total -= float(run.base.action_readout.log_prob(params, one.actions).sum().detach())
    found = _action_loss(run.base, controllers, episodes, 3)
    assert found == pytest.approx(total / float(episodes.lengths.sum()), rel=1e-5)


def test_discovery_is_diagnosed_on_episodes_that_neither_it_nor_its_guide_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Trajectories] = []
    measured = diagnostics.measure
    monkeypatch.setattr(
        diagnostics,
        "measure",
        lambda model, steering, batch, rng: kept.append(batch) or measured(model, steering, batch, rng),
    )
    config, asked = with_seed(debug(), 3), []
    run = RunFolder(tmp_path)
    run.write_config(to_json(config))
    build_model(config).save(run.path / "base_model.safetensors")
    whole = GridworldPinpad.demonstrations

    def noted(self: GridworldPinpad, split: Any, n: int, generator: torch.Generator) -> Trajectories:
        made = whole(self, split, n, generator)
        asked.append((split, made))
        return made

    monkeypatch.setattr(GridworldPinpad, "demonstrations", noted)
    run_discover(config, run, resume=False, quiet=True, device="cpu")
    assert torch.equal(kept[0].states, dict(asked)["validation"].states)
    guide = whole(
        GridworldPinpad(config.domain), "discover", 64, noise_generator(config.discover.seed, torch.device("cpu"))
    )
    trained_on = [made for split, made in asked if split == "discover"]
    assert len(trained_on) > 1
    layouts = {tuple(state) for made in (guide, *trained_on) for state in made.states[:, 0].tolist()}
    assert not torch.equal(guide.states[: kept[0].batch, 0], kept[0].states[:, 0])
    assert sum(tuple(state) in layouts for state in kept[0].states[:, 0].tolist()) <= 1  # 5 x 5 cells: by chance
