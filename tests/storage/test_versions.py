"""Versions on which a world depends: kept in files, and compared when these are read."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from metacontroller.errors import UserError
from metacontroller.phases.artefacts import BASE_MODEL, artefact_path, load_artefact
from metacontroller.presets import preset
from metacontroller.recipes.config import build_model
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.versions import check_versions, record


def test_only_a_package_that_both_name_is_compared() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions("file", {"mujoco": "3.1", "other": "1"}, {"mujoco": "3.1", "third": "2"})
        check_versions("file", {}, {"mujoco": "3.1"})
        check_versions("file", {"metacontroller-rl": "0.1.0"}, {"metacontroller-rl": "0.2.0"})
    with pytest.warns(UserWarning, match=r"file was made with mujoco 3\.1 and 4\.0 is installed.*mujoco==3\.1"):
        check_versions("file", {"mujoco": "3.1"}, {"mujoco": "4.0"})


def test_a_record_names_environment_and_packages() -> None:
    installed = {name: metadata.version(name) for name in ("gymnasium", "metacontroller-rl")}
    assert record("mine:World-v0", ["gymnasium", "numpy", "collections", "not_installed"]) == {
        "environment": "World-v0",
        **installed,
    }
    assert record(None) == {"metacontroller-rl": installed["metacontroller-rl"]}
    stable = record(None, ["stable_baselines3"])  # a module of another name than its package
    assert stable.get("stable-baselines3", stable.get("stable_baselines3")) == metadata.version("stable-baselines3")


def test_another_environment_is_told_by_one_sentence() -> None:
    with pytest.warns(UserWarning, match=r"data was made in Hopper-v4 and this is Hopper-v5: .*\. Name Hopper-v4, or"):
        check_versions("data", {"environment": "Hopper-v4", "a": "1"}, {"environment": "Hopper-v5", "a": "1"})


def test_a_base_model_without_a_record_warns_once_and_is_taken(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), build_model(preset("debug"))
    model.versions = {}
    model.save(artefact_path(run, BASE_MODEL))
    run.versions = {"mujoco": "5.0"}
    with pytest.warns(UserWarning, match=r"base_model.safetensors keeps no record"):
        assert load_artefact(type(model), run, BASE_MODEL, "cpu").versions == {}
    assert load_artefact(type(model), run, BASE_MODEL, "cpu").versions == {}  # warnings are errors here


def test_weights_of_other_data_are_refused(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), build_model(preset("debug"))
    run.versions = model.versions = {"data": "a" * 64}
    model.save(artefact_path(run, BASE_MODEL))
    run.save_checkpoint("pretrain", {"a": torch.zeros(1)}, {})
    run.versions = {"mujoco": "5.0"}  # of a phase that reads no data
    run.load_checkpoint("pretrain")
    run.versions = {"data": "b" * 64}
    said = r"was learned from other data than the run's dataset holds now \(SHA-256 a{12} and b{12}\)"
    with pytest.raises(UserError, match=rf"base_model.safetensors {said}"):
        load_artefact(type(model), run, BASE_MODEL, "cpu")
    with pytest.raises(UserError, match=rf"pretrain.safetensors {said}"):
        run.load_checkpoint("pretrain")


def test_a_checkpoint_keeps_the_versions_of_its_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_checkpoint("plain", {"a": torch.zeros(1)}, {})
    run.versions = {"mujoco": "4.0"}
    run.save_checkpoint("kept", {"a": torch.zeros(1)}, {})
    assert "versions" not in run.load_checkpoint("plain")[1]
    assert run.load_checkpoint("kept")[1]["versions"] == {"mujoco": "4.0"}
    run.versions = {"mujoco": "5.0"}
    with pytest.warns(UserWarning, match=r"kept.safetensors was made with mujoco 4\.0"):
        run.load_checkpoint("kept")


def test_a_module_keeps_its_versions_and_its_file_is_as_before_without_any(tmp_path: Path) -> None:
    run, config = RunFolder(tmp_path), preset("debug")
    model, path = build_model(config), artefact_path(run, BASE_MODEL)
    model.versions = {}
    model.save(path)
    assert b"versions" not in path.read_bytes()
    model.versions = {"mujoco": "4.0"}
    model.save(path)
    assert type(model).init_and_load(path).versions == {"mujoco": "4.0"}
    run.versions = {"mujoco": "5.0"}
    with pytest.warns(UserWarning, match=r"base_model.safetensors was made with mujoco 4\.0 and 5\.0"):
        load_artefact(type(model), run, BASE_MODEL, "cpu")
