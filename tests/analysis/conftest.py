"""Runs for analyses, whose models have learned nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import ExperimentConfig, build_meta_controller, build_model, load_run, to_json
from metacontroller.storage.run_folder import RunFolder


@pytest.fixture
def untrained(tmp_path: Path) -> Callable[..., LoadedRun]:
    """A function that makes the run of a config, by default of the debug preset, in a folder of the test's."""

    def make(config: ExperimentConfig | None = None) -> LoadedRun:
        config = debug() if config is None else config
        folder = RunFolder(tmp_path / "run")
        folder.write_config(to_json(config))
        build_model(config).save(folder.path / "base_model.safetensors")
        build_meta_controller(config).save(folder.path / "meta_controller.safetensors")
        return load_run(folder, "cpu")

    return make
