"""Trackers are told every scalar of metrics.jsonl; without their packages the error says what to install."""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from metacontroller.errors import UserError
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.tracking import Tracker, track_with

LINES = [
    ("pretrain", 3, {"loss": 0.5, "action_loss": 0.25}),
    ("pretrain", 6, {"loss": 0.125}),
    ("discover", 3, {"kl": 2.0}),
]


class Told:
    """Stands for each of the three packages, and keeps what it is told: (name, step) -> value."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.options: dict[str, Any] = {}
        self.steps: list[int] = []

    def SummaryWriter(self, folder: str) -> Told:
        self.options = {"folder": folder}
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value
        self.steps.append(step)

    def flush(self) -> None:
        pass

    def init(self, **options: Any) -> Told:
        print("* a run has begun")
        self.options = options
        return self

    def finish(self) -> None:
        print("* a run has ended")

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        own = next((int(value) for name, value in values.items() if name.endswith("/step")), step)
        assert own is not None
        self.steps.append(own)
        self.scalars |= {(name, own): value for name, value in values.items() if not name.endswith("/step")}


@pytest.mark.parametrize(
    ("tracker", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio"), ("wandb", "wandb")],
)
def test_every_scalar_reaches_the_tracker(
    tracker: Tracker, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setitem(sys.modules, module, told)  # type: ignore[arg-type]
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = track_with(RunFolder(tmp_path / "run"), tracker)
    for phase, step, values in LINES:
        run.log_metrics(phase, step, **values)
    assert told.scalars == {(f"{p}/{name}", step): value for p, step, values in LINES for name, value in values.items()}
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [3, 6, 3]
    if tracker == "wandb":
        assert told.options["mode"] == "offline"


@pytest.mark.parametrize(("tracker", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_run_that_was_killed_and_resumed_tells_each_step_once(
    tracker: Tracker, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice killed after its checkpoint of step 2, the second time before it was as far as the first."""
    told = Told()
    monkeypatch.setitem(sys.modules, module, told)  # type: ignore[arg-type]
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run" / "trackio"))
    RunFolder(tmp_path / "run").log_metrics("pretrain", 1, loss=1.0)  # before anything was tracked
    for first, last in ((1, 5), (2, 3), (2, 7)):
        run = track_with(RunFolder(tmp_path / "run"), tracker)
        run.rewind_metrics("pretrain", first)
        for step in range(first + 1, last + 1):
            run.log_metrics("pretrain", step, loss=1.0)
        (tmp_path / "run" / tracker).mkdir(exist_ok=True)
        with run.metrics_path.open("a") as file:
            file.write('{"phase": "pretrain", "st')
    track_with(RunFolder(tmp_path / "run"), tracker).log_metrics(
        "discover", 1, loss=1.0
    )  # phases count their own steps
    assert told.steps == [2, 3, 4, 5, 6, 7, 1]


def test_a_quiet_tracker_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", Told())  # type: ignore[arg-type]
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    at_end: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda *words: at_end.append(words))
    run = track_with(RunFolder(tmp_path / "run"), "trackio", quiet=True)
    run.log_metrics("pretrain", 1, loss=1.0)
    for function, *words in at_end:
        function(*words)
    assert at_end
    assert capsys.readouterr().out == ""
    track_with(RunFolder(tmp_path / "run"), "trackio")
    assert capsys.readouterr().out == "* a run has begun\n"


def test_quiet_reaches_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Told())  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_SILENT", "")
    monkeypatch.delenv("WANDB_SILENT")
    track_with(RunFolder(tmp_path / "run"), "wandb", quiet=True)
    assert os.environ["WANDB_SILENT"] == "true"


def test_nothing_is_tracked_unless_asked_for(tmp_path: Path) -> None:
    assert track_with(RunFolder(tmp_path), None).listeners == []


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_missing_is_named(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.utils.tensorboard", "trackio", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"{tracker} is not installed; install it by: pip install .*\[track\]"):
        track_with(RunFolder(tmp_path), tracker)
