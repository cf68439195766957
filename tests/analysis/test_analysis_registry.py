"""The registry: an analysis of one's own is found, run, kept and drawn like ours, and has a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from matplotlib.figure import Figure

from metacontroller.analysis import registry
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, analyses, analysis, draw_analysis, run_analysis
from metacontroller.commands.analyse import analysis_commands
from metacontroller.domains.base import DomainSpec
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad
from metacontroller.report.analysis_figures import ANALYSIS_FIGURES

Untrained = Callable[..., LoadedRun]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Analysis]:
    """An analysis that is registered for one test."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))

    @analysis("toy", command="play", figure="none of the paper's")
    class Toy(Analysis):
        """Counts and doubles."""

        @dataclass(frozen=True, kw_only=True)
        class Config:
            count: int = 3

        def measure(self, run: LoadedRun, config: Any, *, quiet: bool = False) -> dict[str, Any]:
            return {"count": config.count, "double": 2.0 * config.count, "none": float("nan"), "listed": [1, 2]}

        def draw(self, results: Any) -> Figure:
            figure = Figure()
            figure.subplots().plot([result["count"] for result in results])
            return figure

    return Toy


def test_ours_are_all_there() -> None:
    found = analyses()
    assert {name: kind.command for name, kind in found.items()} == {
        "episodes": "episodes",
        "gate": "gate",
        "injection": "inject",
        "oracle": "oracle",
        "probes": "probe",
        "steering": "steer",
    }
    for name, kind in found.items():
        assert kind.name == name
        kind.Config()  # every option has a default
        if name in ANALYSIS_FIGURES:
            assert ANALYSIS_FIGURES[name][0] == kind.file


def test_one_of_your_own_is_found_run_kept_and_drawn(untrained: Untrained, toy: type[Analysis]) -> None:
    run = untrained()
    assert isinstance(analyses()["toy"], toy)
    assert run_analysis("toy", run)["count"] == 3
    results = run_analysis("toy", run, toy.Config(count=5))
    assert results == run.folder.read_analysis("toy")
    assert results == {"count": 5, "double": 10.0, "none": None, "listed": [1, 2]}
    assert toy().rows([results, results]) == [("count", [5, 5]), ("double", [10.0, 10.0]), ("none", [None, None])]
    draw_analysis("toy", run.folder, [run.folder])
    assert (run.folder.path / "figures" / "toy.png").stat().st_size > 0


def test_one_of_your_own_has_a_command(
    untrained: Untrained, toy: type[Analysis], capsys: pytest.CaptureFixture[str]
) -> None:
    run = untrained()
    kind = analysis_commands()["play"]
    assert kind.__doc__ == "Counts and doubles."
    options: dict[str, Any] = {"run": run.folder.path, "device": "cpu", "config": toy.Config(count=4)}
    kind(**options)()
    lines = capsys.readouterr().out.splitlines()
    assert any("double" in line and "8" in line for line in lines)


def test_two_of_one_name_are_refused(toy: type[Analysis]) -> None:
    with pytest.raises(ValueError, match=r"analysis 'toy' is defined in .*; rename one"):

        @analysis("toy", command="other", figure="")
        class Other(Analysis): ...


def test_what_cannot_be_run_is_refused_in_a_sentence(untrained: Untrained) -> None:
    run = untrained()
    with pytest.raises(ValueError, match="analysis 'horoscope' is unknown; known are episodes, gate, "):
        run_analysis("horoscope", run)

    class Unlabelled(GridworldPinpad):
        def spec(self) -> DomainSpec:
            return replace(super().spec(), subgoals=())

    unlabelled = replace(run, domain=Unlabelled(run.domain.config))
    with pytest.raises(ValueError, match="probes needs the subgoal of each step, and the demonstrations of gridworld"):
        run_analysis("probes", unlabelled)
