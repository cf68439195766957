from __future__ import annotations

import importlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.lines import Line2D

from metacontroller.errors import UserError
from metacontroller.report.analysis_figures import ANALYSIS_FIGURES
from metacontroller.report.figures import (
    codes_figure,
    draw_run,
    gate_figure,
    losses_figure,
    require_matplotlib,
    success_figure,
)
from metacontroller.storage.run_folder import RunFolder

NAN = math.nan


def rl_run(path: Path, success: list[float]) -> RunFolder:
    run = RunFolder(path)
    for update, value in enumerate(success, 1):
        run.log_metrics("internal_rl", update, success=value, episodes=16 * update)
        run.log_metrics("raw_action_rl", update, success=0.0, episodes=16 * update)
    return run


def points(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = line.get_data()
    return np.asarray(x).tolist(), np.asarray(y).tolist()


def test_success_is_drawn_as_the_median_with_a_band_of_quartiles(tmp_path: Path) -> None:
    levels = ([0.0, 0.2, 0.4], [0.1, 0.4, 0.8], [0.0, 0.8, 0.9], [0.4, 0.6])  # the last was cut short
    runs = [rl_run(tmp_path / str(index), list(level)) for index, level in enumerate(levels)]
    (ax,) = success_figure(runs, "0-1").axes
    internal, raw = ax.get_lines()
    assert points(internal) == ([16, 32], pytest.approx([0.05, 0.5]))
    assert points(raw) == ([16, 32], [0, 0])
    assert len(ax.collections) == 2
    assert ax.get_ylim()[1] > 1
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("episodes", "success rate")
    assert ax.get_title() == "Task: 0-1, 4 seeds"


def test_one_run_has_no_band_and_a_low_curve_fills_the_axis(tmp_path: Path) -> None:
    (ax,) = success_figure([rl_run(tmp_path, [0.01, 0.1])], "0-1").axes
    assert not ax.collections
    assert ax.get_ylim()[1] == pytest.approx(0.11)


def test_losses_have_units(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log_metrics("pretrain", 5, action_loss=1.2)
    run.log_metrics("discover", 5, action_loss=0.5, kl=float("nan"))
    run.log_metrics("discover", 10, action_loss=0.4, kl=2.0)
    left, right = losses_figure(run).axes
    assert points(left.get_lines()[0]) == ([5], [1.2])
    assert points(right.get_lines()[0]) == ([5, 10], [0.5, 0.4])
    assert "nats" in left.get_ylabel()
    assert "nats" in right.get_ylabel()
    assert right.get_yscale() == "log"


def test_negative_losses_of_continuous_actions_are_seen(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log_metrics("pretrain", 5, action_loss=1.2)
    run.log_metrics("discover", 5, action_loss=0.5, kl=3.0)
    run.log_metrics("discover", 10, action_loss=-1.5, kl=2.0)
    right = losses_figure(run).axes[1]
    low, high = right.get_ylim()
    assert low < -1.5
    assert high > 3.0


def test_what_is_too_large_to_draw_and_what_was_not_logged_leaves_a_gap(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step, value in enumerate((1e308, 0.5, -1e300), 1):
        run.log_metrics("pretrain", step, action_loss=value)
        run.log_metrics("discover", step, kl=value)
    with run.metrics_path.open("a") as file:
        file.write(json.dumps({"phase": "pretrain", "step": 10**400, "action_loss": 10**400}) + "\n")
    figure = losses_figure(run)
    figure.savefig(tmp_path / "x.png")
    assert points(figure.axes[0].get_lines()[0])[1] == pytest.approx([NAN, 0.5, NAN, NAN], nan_ok=True)
    assert points(figure.axes[1].get_lines()[0])[1] == pytest.approx([NAN] * 3, nan_ok=True)


def test_codes_are_sorted_by_their_favourite_subgoal() -> None:
    share = torch.tensor([[0.0, 0.1, 0.9], [0.2, 0.8, 0.0], [1.0, 0.0, 0.0]])  # columns: none, then each subgoal
    ax = codes_figure(share, 1.234, ["0-1", "2-3"]).axes[0]
    shown = torch.tensor(ax.images[0].get_array().tolist())  # type: ignore[union-attr]
    torch.testing.assert_close(shown, torch.tensor([[0.8, 0.0, 0.2], [0.1, 0.9, 0.0], [0.0, 0.0, 1.0]]))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0-1", "2-3", "none"]
    assert ax.get_title() == "1.23 bits"


def test_without_matplotlib_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"matplotlib is not installed; .* pip install 'metacontroller-rl\[viz\]'\."):
        require_matplotlib()


def test_the_gate_is_drawn_with_the_changes_of_subgoal() -> None:
    episode = {"task": "b → a", "changes": [2], "gate": [1.0, 0.1, 0.9]}
    axes = gate_figure({"episodes": [episode, {**episode, "task": "", "changes": None}]}).axes
    labelled, unlabelled = axes
    assert labelled.get_ylabel() == "b → a"
    assert [points(line) for line in labelled.get_lines()] == [([2, 2], [0, 1]), ([0, 1, 2], [1.0, 0.1, 0.9])]
    assert len(unlabelled.get_lines()) == 1


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    drawn = [success_figure([run], "go"), gate_figure({}), *(draw([]) for _, _, draw in ANALYSIS_FIGURES.values())]
    for figure in drawn:
        assert all("measured" in " ".join(text.get_text() for text in ax.texts) for ax in figure.axes)
    draw_run(run, {"task": "go", "code_subgoal_share": None})
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"losses", "gate", "success", "codes"}


def test_a_matplotlib_that_cannot_be_imported_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Any:
        raise ValueError("Key backend: 'nonsense' is not a valid value for backend")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(UserError, match=r"matplotlib cannot be imported .ValueError: Key backend: 'nonsense'"):
        require_matplotlib()
