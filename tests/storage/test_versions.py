"""Versions on which a world depends: kept in files, and compared when these are read."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from metacontroller.phases.artefacts import BASE_MODEL, artefact_path, load_artefact
from metacontroller.presets import preset
from metacontroller.recipes.config import build_model
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.versions import warn_of_versions


def test_only_a_package_that_both_name_is_compared() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_versions("file", {"mujoco": "3.1", "other": "1"}, {"mujoco": "3.1", "third": "2"})
        warn_of_versions("file", {}, {"mujoco": "3.1"})
    with pytest.warns(UserWarning, match=r"file was made with mujoco 3\.1 and 4\.0 is installed.*mujoco==3\.1"):
        warn_of_versions("file", {"mujoco": "3.1"}, {"mujoco": "4.0"})


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
    model.save(path)
    assert b"versions" not in path.read_bytes()
    model.versions = {"mujoco": "4.0"}
    model.save(path)
    assert type(model).init_and_load(path).versions == {"mujoco": "4.0"}
    run.versions = {"mujoco": "5.0"}
    with pytest.warns(UserWarning, match=r"base_model.safetensors was made with mujoco 4\.0 and 5\.0"):
        load_artefact(type(model), run, BASE_MODEL, "cpu")
