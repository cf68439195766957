"""A dataset of one's own as a world: what is read from the data, what needs an environment, what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from metacontroller.data.datasets import Dataset
from metacontroller.data.store import Episodes
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import FREE
from metacontroller.domains.offline.domain import Offline, OfflineConfig
from metacontroller.errors import UserError
from metacontroller.presets import preset
from metacontroller.recipes.config import build_model

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
    spec = Offline(OfflineConfig(dataset=folder)).spec()
    states = np.concatenate([episode["states"] for episode in trajectories().episodes()])
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
