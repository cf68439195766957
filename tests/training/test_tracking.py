"""Trackers are told every scalar of metrics.jsonl; without their packages the error says what to install."""

from __future__ import annotations

import json
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

    def SummaryWriter(self, folder: str) -> Told:
        self.options = {"folder": folder}
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def flush(self) -> None:
        pass

    def init(self, **options: Any) -> Told:
        self.options = options
        return self

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        own = next((int(value) for name, value in values.items() if name.endswith("/step")), step)
        assert own is not None
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


def test_nothing_is_tracked_unless_asked_for(tmp_path: Path) -> None:
    assert track_with(RunFolder(tmp_path), None).listeners == []


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_missing_is_named(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.utils.tensorboard", "trackio", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"{tracker} is not installed; install it by: pip install .*\[track\]"):
        track_with(RunFolder(tmp_path), tracker)
