"""Folders of recipes: each knows what it is, and its config is read in any working directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from metacontroller import cli
from metacontroller.data.datasets import Dataset
from metacontroller.data.trajectories import Episodes, Trajectories
from metacontroller.domains.registry import domain_of
from metacontroller.errors import UserError
from metacontroller.presets import preset
from metacontroller.presets.gridworld import debug
from metacontroller.recipes import reproduce as reproduce_module
from metacontroller.recipes import sweep as sweep_module
from metacontroller.recipes.config import read_config, to_json, with_values
from metacontroller.recipes.reproduce import reproduce
from metacontroller.recipes.schedule import number_name
from metacontroller.recipes.study import study
from metacontroller.recipes.study_runs import StudyConfig, study_runs
from metacontroller.recipes.sweep import SweepJob, sweep
from metacontroller.storage.run_folder import RunFolder

GRID: dict[str, Any] = {"seeds": [0], "alphas": [0.1], "lrs": [1e-3]}


class BegunError(Exception):
    """A recipe has begun its work."""


def interrupt(*_: Any, **__: Any) -> None:
    raise BegunError


def begun(command: Callable[[], Any]) -> None:
    """Starts a recipe and interrupts it at the first of its runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce_module, "reproduce_seed", interrupt)
        patch.setattr(sweep_module, "run_all", interrupt)
        with pytest.raises(BegunError):
            command()


RECIPES: dict[str, Callable[[Path], Any]] = {
    "reproduction": lambda out: reproduce(debug(), out, [0], resume=True, quiet=True),
    "sweep": lambda out: sweep(debug(), out, **GRID, resume=True, quiet=True),
}


@pytest.mark.parametrize(
    ("kind", "other", "command"), [("reproduction", "sweep", "sweep"), ("sweep", "reproduction", "reproduce")]
)
def test_a_recipe_refuses_the_folder_of_another(
    kind: str,
    other: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    begun(lambda: RECIPES[kind](out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    modules = ("commands.train.run_pretrain", "recipes.study.run_all", "recipes.sweep.run_all")
    for module in (*modules, "recipes.reproduce.reproduce_seed"):
        monkeypatch.setattr(f"metacontroller.{module}", interrupt)
    with pytest.raises(UserError, match=f"out is a {kind}; give {command} a folder of its own"):
        RECIPES[other](out)
    assert cli.main(["pretrain", str(out), "--resume", "--quiet", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"metacontroller: {out} is a {kind}; give pretrain a folder of its own.\n"
    if kind == "sweep":
        with pytest.raises(UserError, match="out is a sweep; give figures a folder of its own"):
            study(StudyConfig(), out, [0], quiet=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert read_config(RunFolder(out)) == debug()
    begun(lambda: RECIPES[kind](out))  # its own recipe goes on


@pytest.mark.parametrize(("kind", "command"), [("reproduction", "reproduce"), ("sweep", "sweep")])
def test_a_recipe_refuses_a_run(kind: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(tmp_path / "run").write_config(to_json(debug()))
    RunFolder(tmp_path / "run").log_metrics("pretrain", 3, loss=1.0)
    for module in ("recipes.sweep.run_all", "recipes.reproduce.reproduce_seed"):
        monkeypatch.setattr(f"metacontroller.{module}", interrupt)
    with pytest.raises(UserError, match=f"run is a run; give {command} a folder of its own"):
        RECIPES[kind](tmp_path / "run")


def test_values_are_changed_by_their_dotted_names() -> None:
    config, steps = debug(), {"discover.optimizer.steps": 9, "discover.optimizer.decay_steps": 8}
    changed = with_values(config, {**steps, "discover.alpha": 0.5, "seed": 3})  # together: 8 of 9 steps may decay
    optimizer = replace(config.discover.optimizer, steps=9, decay_steps=8)
    assert changed == replace(config, seed=3, discover=replace(config.discover, alpha=0.5, optimizer=optimizer))
    assert with_values(config, {}) == config == debug()
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        with_values(config, {"discover.beta": 0.5})


def test_numbers_that_differ_have_folders_that_differ() -> None:
    assert SweepJob(0, 0.1, 1e-3).folder == "seed-0/alpha-0.1/lr-0.001"
    close = [0.1, 0.1000001, np.nextafter(0.1, 1), 1, 1000000.0, 1000001.0, 3e-5]
    assert len({SweepJob(0, alpha).folder for alpha in close}) == len(close)
    assert len({SweepJob(0, 0.1, lr).folder for lr in close}) == len(close)
    assert all(float(number_name(value)) == value for value in close)
    assert number_name(1) == number_name(1.0) == "1"
    study_config = StudyConfig(alphas=(0.1, 0.1000001), weight_decays=(0.1, 0.1000001))
    names = [name for name in study_runs(debug(), study_config) if name.startswith(("rate-frozen", "weight-decay"))]
    assert names == ["rate-frozen-0.1", "rate-frozen-0.1000001", "weight-decay-0.1", "weight-decay-0.1000001"]


@pytest.mark.parametrize("recipe", [reproduce, lambda *arguments: sweep(*arguments, **GRID)])
def test_an_experiment_on_own_data_can_go_on_in_another_working_directory(
    recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere, config = tmp_path / "here", tmp_path / "elsewhere", preset("offline-debug")
    rows = [{"states": np.zeros((3, 2)), "actions": np.array([0, 1])}]
    box = spaces.Box(-1, 1, (2,), np.float64)
    Dataset(Episodes.of(Trajectories.from_episodes(rows)), box, spaces.Discrete(2)).write(here / "data")
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    chosen = replace(config, domain=replace(config.domain, dataset="data"))
    begun(lambda: recipe(chosen, tmp_path / "out"))
    monkeypatch.chdir(elsewhere)
    domain = read_config(RunFolder(tmp_path / "out")).domain
    assert domain.dataset == str(here / "data")
    assert domain_of(domain).spec().max_steps == 2
