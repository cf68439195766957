"""Pretraining: it learns, and the optional next-state loss is learned and logged only when it is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.registry import domain_of
from metacontroller.models.protocol import SteerableModel
from metacontroller.models.transformer import Transformer
from metacontroller.objectives.clips import draw_clips
from metacontroller.phases.pretrain import PretrainConfig, pretrain
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_model
from metacontroller.recipes.run_phase import demonstrations
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.optimizer import OptimizerConfig
from metacontroller.training.seeding import noise_generator

OPTIMIZER = OptimizerConfig(steps=40, batch_size=16, lr=1e-2, log_every=10)


def learn(folder: Path, **options: Any) -> tuple[SteerableModel, list[dict[str, Any]]]:
    """A model of the debug preset after 40 updates, and what was logged."""
    config = dataclasses.replace(debug(), pretrain=PretrainConfig(optimizer=OPTIMIZER, **options))
    run = RunFolder(folder)
    model = pretrain(
        config.pretrain, build_model(config), demonstrations(domain_of(config.domain), "pretrain"), run, quiet=True
    )
    return model, run.read_metrics("pretrain")


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_pretraining_lowers_the_losses_it_is_asked_to(weight: float, tmp_path: Path) -> None:
    model, lines = learn(tmp_path, state_loss_weight=weight)
    names = {"phase", "step", "loss", "action_loss"} | ({"state_loss"} if weight else set())
    assert all(set(line) == names for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(line["action_loss"] + weight * line.get("state_loss", 0.0), rel=1e-5)
    assert lines[-1]["action_loss"] < 0.95 * lines[0]["action_loss"]
    if weight:
        assert lines[-1]["state_loss"] < 0.95 * lines[0]["state_loss"]
    before, after = (one.state_readout.state_dict()["linear.weight"] for one in (build_model(debug()), model))
    assert torch.equal(before, after) == (weight == 0)


def every_third(episodes: Trajectories) -> Tensor:
    return episodes.mask() & (torch.arange(episodes.steps) % 3 == 0)


def test_the_loss_of_clips_is_added(tmp_path: Path) -> None:
    """Of the first update, with the clips drawn again."""
    config, optimizer = debug(), dataclasses.replace(OPTIMIZER, steps=1, log_every=1)
    source, run = demonstrations(domain_of(config.domain), "pretrain"), RunFolder(tmp_path)
    settings = PretrainConfig(optimizer=optimizer, clips=2, clip_steps=4, state_loss_weight=0.5)
    pretrain(settings, build_model(config), source, run, decisions=every_third, quiet=True)
    (line,) = run.read_metrics("pretrain")
    clips = draw_clips(source, every_third, 32, 4, noise_generator(settings.seed, torch.device("cpu"))).clips
    with torch.no_grad():
        expected = build_model(config).behavior_cloning_loss(clips.states, clips.actions, clips.lengths)
    assert line["clip_loss"] == pytest.approx(float(expected.action), rel=1e-5)
    whole = line["action_loss"] + 0.5 * line["state_loss"]
    assert line["loss"] == pytest.approx(whole + float(expected.action + 0.5 * expected.state), rel=1e-5)


def test_pretraining_with_clips_resumes_exactly(tmp_path: Path) -> None:
    config = debug()
    source, learned = demonstrations(domain_of(config.domain), "pretrain"), []
    for name, parts in (("whole", [6]), ("pieces", [3, 6])):
        for number, steps in enumerate(parts):
            optimizer = dataclasses.replace(OPTIMIZER, steps=steps, checkpoint_every=3)
            model, run = build_model(config), RunFolder(tmp_path / name)
            settings = PretrainConfig(optimizer=optimizer, clips=2)
            pretrain(settings, model, source, run, decisions=every_third, resume=number > 0, quiet=True)
        learned.append(model.state_dict())
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())
    with pytest.raises(ValueError, match="clips is 2, but no decisions are given; expected 0"):
        pretrain(settings, build_model(config), source, RunFolder(tmp_path / "other"), quiet=True)


def test_the_model_is_saved(tmp_path: Path) -> None:
    model, _ = learn(tmp_path)
    saved = Transformer.init_and_load(tmp_path / "base_model.safetensors").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_bad_data_is_refused_at_the_first_step(tmp_path: Path) -> None:
    config = debug()
    source = demonstrations(domain_of(config.domain), "pretrain")

    def broken(n: int, generator: torch.Generator) -> Any:
        episodes = source(n, generator)
        return dataclasses.replace(episodes, actions=episodes.actions + 4)

    with pytest.raises(ValueError, match="actions range over 4"):
        pretrain(config.pretrain, build_model(config), broken, RunFolder(tmp_path), quiet=True)


def test_a_snapshot_is_the_model_of_that_update(tmp_path: Path) -> None:
    learn(tmp_path / "new" / "run", snapshots=(1, 40, 99))
    kept = tmp_path / "new" / "run" / "snapshots"
    assert {path.name for path in kept.iterdir()} == {"base_model-1.safetensors", "base_model-40.safetensors"}
    final = (tmp_path / "new" / "run" / "base_model.safetensors").read_bytes()
    assert (kept / "base_model-40.safetensors").read_bytes() == final
    assert (kept / "base_model-1.safetensors").read_bytes() != final
    with pytest.raises(ValueError, match=r"snapshots\[0\] is 0; expected at least 1"):
        PretrainConfig(optimizer=OPTIMIZER, snapshots=(0,))


def test_a_weight_of_choices_that_there_are_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"choice_weight is 20\.0, but actions are no mixture"):
        learn(tmp_path, choice_weight=20.0)
