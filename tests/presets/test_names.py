"""Presets by name: our own, their aliases, and functions of one's own."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from metacontroller.commands.experiment import Figures
from metacontroller.presets import DEFAULT, preset, preset_names, study_config
from metacontroller.presets.gridworld import PRESETS, STUDIES, debug, laptop
from metacontroller.recipes.config import ExperimentConfig, with_seed
from metacontroller.recipes.study import analysis_config
from metacontroller.recipes.study_runs import StudyConfig


def bare() -> ExperimentConfig:
    """A preset whose phases have no seeds of their own yet."""
    return replace(debug(), seed=7)


def test_a_preset_has_a_name_and_the_gridworlds_a_short_one() -> None:
    assert {f"gridworld-{name}" for name in PRESETS} <= set(preset_names())
    assert preset("gridworld-debug") == preset("debug") == debug()
    assert preset(DEFAULT) == laptop()
    assert study_config("debug") == study_config("gridworld-debug") == STUDIES["debug"]


def test_every_preset_has_a_study_of_its_own() -> None:
    studies = {name: import_module(f"metacontroller.presets.{name.split('-')[0]}").STUDIES for name in preset_names()}
    assert {name for name, listed in studies.items() if name.split("-")[1] not in listed} == set()
    assert study_config("offline-debug") == STUDIES["debug"]


def test_the_studies_of_the_paper_train_small_things_as_it_does() -> None:
    for name, batch_size, lr in (("gridworld-paper", 512, 1e-3), ("ant-paper", 256, 3e-4)):
        chosen = Figures.defaults(["--preset", name]).study
        steering = analysis_config("steering", chosen)
        assert (steering.steps, steering.batch_size, steering.lr) == (3200, batch_size, lr)
        assert analysis_config("probes", chosen).batch_size == batch_size
    laptop_study = analysis_config("probes", study_config("laptop"))
    assert (laptop_study.batch_size, laptop_study.lr) == (128, 3e-3)


def test_a_function_of_ones_own_is_a_preset() -> None:
    assert preset("metacontroller.presets.gridworld:debug") == debug()
    assert preset(f"{__name__}:bare") == with_seed(debug(), 7)
    assert study_config(f"{__name__}:bare") == StudyConfig()


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets_of_mine.py").write_text("from metacontroller.presets.gridworld import debug as mine\n")
    (tmp_path / "presets_that_need_more.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    assert preset("presets_of_mine:mine") == debug()
    with pytest.raises(ValueError, match="needs the module no_such_package, which is not installed"):
        preset("presets_that_need_more:mine")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("desktop", "preset 'desktop' is unknown; known are .*gridworld-debug, .* and package.module:function"),
        ("moon-laptop", "preset 'moon-laptop' is unknown; known are"),
        ("gridworld-", "preset 'gridworld-' is unknown; known are"),
        ("no_such_package.presets:mine", "names no module that can be imported; write package.module:function"),
        (":mine", "preset .:mine. is of another form; write package.module:function"),
        ("metacontroller.presets.gridworld:mine", "is no function of metacontroller.presets.gridworld; name one"),
        ("os:getcwd", "preset 'os:getcwd' returned a str; expected an ExperimentConfig"),
    ],
)
def test_what_is_no_preset_is_refused_in_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        preset(name)
