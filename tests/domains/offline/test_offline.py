"""A dataset of one's own as a world: what is read from the data, what needs an environment, what does not fit."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from metacontroller import cli
from metacontroller.data.datasets import Dataset
from metacontroller.data.trajectories import Episodes, Trajectories
from metacontroller.domains import guarded_environment
from metacontroller.domains.base import FREE
from metacontroller.domains.offline.domain import Offline, OfflineConfig
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.presets import preset
from metacontroller.recipes.collect import CollectConfig, collect
from metacontroller.recipes.config import build_model, from_json, to_json
from metacontroller.recipes.run_phase import run_pretrain
from metacontroller.storage.files import plain
from metacontroller.storage.run_folder import RunFolder

CARTPOLE = spaces.Box(-10, 10, (4,), np.float32)


def trajectories(lengths: tuple[int, ...] = (3, 9, 5), actions: int = 2) -> Trajectories:
    rng = np.random.default_rng(0)
    return Trajectories.from_episodes(
        {"states": rng.normal(4.0, 3.0, (steps + 1, 4)), "actions": rng.integers(actions, size=steps)}
        for steps in lengths
    )


def seen_less() -> Trajectories:
    """Actions of which the larger one never occurs."""
    whole = trajectories()
    return replace(whole, actions=whole.actions * 0)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    Dataset(Episodes.of(trajectories()), CARTPOLE, spaces.Discrete(2)).write(tmp_path / "data")
    return str(tmp_path / "data")


def test_the_spec_is_read_from_the_data(folder: str) -> None:
    world = Offline(OfflineConfig(dataset=folder))
    spec, seen = world.spec(), [row for row in range(3) if row not in world._split.validation]
    episodes = [episode["states"] for episode in trajectories().episodes()]
    states = np.concatenate([episodes[row] for row in seen])
    assert len(seen) == 2
    assert spec.action == {"num_discrete": 2}
    assert (spec.max_steps, spec.subgoals, spec.encoder["num_continuous"]) == (9, (), 4)
    np.testing.assert_allclose(spec.encoder["mean"], states.mean(0))
    np.testing.assert_allclose(spec.encoder["std"], states.std(0))


def test_statistics_are_kept_in_the_checkpoint(folder: str, tmp_path: Path) -> None:
    config = preset("offline-debug")
    config = replace(config, domain=replace(config.domain, dataset=folder))
    model = build_model(config)
    model.save(tmp_path / "model.safetensors")
    loaded = config.model.Model.init_and_load(tmp_path / "model.safetensors")
    kept, expected = loaded.encoder.mean, model.encoder.mean
    assert isinstance(kept, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(kept, expected)
    assert float(kept.mean()) > 2
    states, actions = trajectories().states.float(), trajectories().actions
    assert torch.equal(loaded.residual(states, actions), model.residual(states, actions))


def test_demonstrations_are_repeatable_episodes_of_the_data(folder: str) -> None:
    domain = Offline(OfflineConfig(dataset=folder, window=5))
    first, again = (domain.demonstrations("pretrain", 40, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first.states, again.states)
    assert set(first.lengths.tolist()) == {3, 5}
    assert first.states.dtype == torch.float32


def test_acting_needs_an_environment(folder: str) -> None:
    domain = Offline(OfflineConfig(dataset=folder))
    with pytest.raises(UserError, match=r"pretrain RUN --resume --env ID, a Gymnasium ID"):
        domain.reset(2, torch.Generator())


def test_an_environment_acts_and_has_one_task(folder: str) -> None:
    domain = Offline(OfflineConfig(dataset=folder, env="CartPole-v1", max_steps=3))
    batch = domain.reset(2, torch.Generator())
    for _ in range(3):
        batch.step(torch.zeros(2, dtype=torch.int64))
    assert batch.truncated.tolist() == [True, True]
    assert domain.spec().max_steps == 3
    with pytest.raises(UserError, match="has one task"):
        domain.reset(2, torch.Generator(), task=FREE)


def test_an_environment_of_other_spaces_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match=r"the data have observations .* but env 'Acrobot-v1' has"):
        Offline(OfflineConfig(dataset=folder, env="Acrobot-v1")).spec()


def test_an_environment_knows_choices_that_the_data_never_show() -> None:
    name = f"{__name__}:seen_less"
    assert Offline(OfflineConfig(dataset=name)).spec().action == {"num_discrete": 2}  # two at least
    assert Offline(OfflineConfig(dataset=name, env="CartPole-v1")).dataset.action_space == spaces.Discrete(2)


FROZEN = {"is_slippery": False, "max_episode_steps": 30}


def last_action(observation: Any, env: Any) -> int:
    return 3


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    """Episodes on ice that is not slippery, of at most 30 steps."""
    options = {"env_kwargs": json.dumps({"is_slippery": False}), "max_steps": 30, "episodes": 4}
    config = CollectConfig(env="FrozenLake-v1", policy=f"{__name__}:last_action", **options)
    collect(config, tmp_path / "ice", quiet=True)
    return str(tmp_path / "ice")


def test_a_run_acts_where_its_data_were_recorded(recorded: str, tmp_path: Path) -> None:
    domain = Offline(OfflineConfig(dataset=recorded))
    with pytest.raises(UserError, match="pretrain RUN --resume --env data"):
        domain.check_acting()
    command = cli.parse(["pretrain", "run", "--dataset", recorded, "--env", "data"])
    started = command._started(RunFolder(tmp_path / "run"))
    config = started.domain
    assert config == replace(domain.acting_where_recorded(), dataset=config.dataset)
    assert config.env == "FrozenLake-v1"
    assert FROZEN.items() <= json.loads(config.env_kwargs).items()
    assert from_json(json.loads(json.dumps(to_json(started), default=plain))).domain == config
    acting = Offline(config)  # without a warning
    assert acting.spec().max_steps == 30
    batch = acting.reset(16, torch.Generator().manual_seed(0))
    for action in (1, 1, 2, 2, 1, 2):
        batch.step(torch.full((16,), action))
    assert batch.success.all()  # on slippery ice one in a hundred succeeds


@pytest.mark.filterwarnings("always")
def test_an_environment_that_is_made_otherwise_is_said(recorded: str) -> None:
    with pytest.warns(
        UserWarning, match=r"with the keywords .*\"is_slippery\": false.* and not .*, the time limit 30 and"
    ):
        assert Offline(OfflineConfig(dataset=recorded, env="FrozenLake-v1")).spec().max_steps == 100


def test_no_module_is_imported_because_data_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(guarded_environment, "_modules_on_gymnasium", lambda name: [])  # importing all takes seconds
    (tmp_path / "strange_module.py").write_text("open('trace', 'w').close()\n")
    made = {"env": "strange_module:Strange-v0", "env_kwargs": '{"size": 3}'}
    Dataset(Episodes.of(trajectories()), CARTPOLE, spaces.Discrete(2), **made).write("data")  # type: ignore[arg-type]
    domain = Offline(OfflineConfig(dataset="data"))
    asking = re.escape("""--env strange_module:Strange-v0 --env-kwargs '{"size": 3}'""")
    with pytest.raises(UserError, match=f"do not tell an environment that is known here; write {asking}"):
        domain.acting_where_recorded()
    with pytest.raises(UserError, match=f"pretrain RUN --resume {asking}"):
        domain.check_acting()
    assert not Path("trace").exists()


def test_keywords_are_an_object_without_names_of_code(folder: str) -> None:
    for text, said in {
        "[1]": r"env_kwargs are '\[1\]'; expected a JSON object",
        "is_slippery=false": "env_kwargs are 'is_slippery=false' .*; expected a JSON object",
        '{"env_id": ["strange_module:Strange-v0"]}': "env_kwargs name strange_module:Strange-v0, a module that would",
        '{"config": {"kind": "json.decoder.JSONDecoder"}}': "env_kwargs name json.decoder.JSONDecoder, a module that",
        '{"env_id": "strange-module:Strange-v0"}': "env_kwargs name strange-module:Strange-v0, a module that would",
    }.items():
        with pytest.raises(UserError, match=said):
            OfflineConfig(dataset=folder, env="CartPole-v1", env_kwargs=text)
    assert OfflineConfig(dataset=folder, env="Ant-v5", env_kwargs='{"xml_file": "my_ant.xml", "version": "v1.0"}')
    with pytest.raises(UserError, match="and there is no env; name one"):
        OfflineConfig(dataset=folder, env_kwargs='{"size": 3}')
    with pytest.raises(UserError, match=r"env 'CartPole-v1' cannot be made: TypeError: .*'size'"):
        Offline(OfflineConfig(dataset=folder, env="CartPole-v1", env_kwargs='{"size": 3}')).spec()


def test_a_dataset_is_asked_for() -> None:
    with pytest.raises(UserError, match="start the run with --dataset ID"):
        Offline(OfflineConfig()).spec()
    with pytest.raises(UserError, match="window is 0; expected at least 1"):
        OfflineConfig(window=0)


# -- scale ------------------------------------------------------------------------------------------------------------


def meters(unit: float = 1.0) -> Trajectories:
    """Actions that the sign of a place tells."""
    rng = np.random.default_rng(0)
    places = 0.3 * rng.normal(size=(64, 9, 2))
    return Trajectories.from_episodes(
        {"states": place * unit, "actions": (place[:-1, 0] > 0).astype(np.int64)} for place in places
    )


def micrometers() -> Trajectories:
    return meters(1e-6)


def symbols() -> Trajectories:
    """Actions that one cell of a grid of a few small numbers tells, as MiniGrid's."""
    rng = np.random.default_rng(0)
    grids = rng.choice([1, 2, 8], p=[0.5, 0.45, 0.05], size=(64, 9, 4, 4, 3)).astype(np.uint8)
    return Trajectories.from_episodes(
        {"states": grid, "actions": (grid[:-1, 0, 0, 0] == 2).astype(np.int64)} for grid in grids
    )


def trained(source: str, updates: int = 60) -> float:
    """The action loss, in nats, of a small model after so many updates on a dataset."""
    config = preset("offline-debug")
    config = replace(config, domain=replace(config.domain, dataset=f"{__name__}:{source}"))
    model, domain = build_model(config), Offline(config.domain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(updates):
        batch = domain.demonstrations("pretrain", 32, generator)
        loss = model.behavior_cloning_loss(batch.states, batch.actions, batch.lengths).action
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses[-10:]))


def test_the_unit_of_a_length_changes_nothing() -> None:
    assert trained("meters") < 0.1
    assert trained("micrometers") < 0.1


def test_a_grid_of_a_few_small_numbers_is_no_black_picture() -> None:
    assert Offline(OfflineConfig(dataset=f"{__name__}:symbols")).spec().encoder["image"] == [4, 4, 3]
    assert trained("symbols") < 0.2  # 0.68 where they are divided by 255


def test_a_model_acts_by_no_more_steps_than_it_learned_from_and_says_so(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = preset("offline-debug")
    for window, limit, told in ((5, 9, True), (5, 5, False), (9, 9, False)):
        domain = replace(config.domain, dataset=folder, window=window, max_steps=limit)
        short = replace(config.pretrain, optimizer=replace(config.pretrain.optimizer, steps=1, decay_steps=0))
        run = RunFolder(tmp_path / f"{window}-{limit}")
        settings = replace(config, domain=domain, pretrain=short)
        run_pretrain(settings, run, resume=False, quiet=False, device="cpu")
        model = Transformer.init_and_load(run.path / "base_model.safetensors")
        assert model.arguments["context"] == window
        assert {block.window for block in model.upper_body.blocks} == {window}
        line = "pretrain: episodes may take 9 steps and models learn from 5 at once (domain.window), so attention acts"
        assert (line in capsys.readouterr().err) == told
