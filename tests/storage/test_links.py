"""A link in a run folder leads no writer and no reader out of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from metacontroller.commands.options import seed_folders
from metacontroller.errors import UserError
from metacontroller.phases.pretrain import snapshot_path
from metacontroller.recipes.jobs import failure_read, write_failure
from metacontroller.recipes.study import StudyJob
from metacontroller.recipes.sweep import SweepJob
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.divergence import NotFinite, diverged
from metacontroller.training.tracking import track_with

WRITES: dict[str, Callable[[RunFolder], Any]] = {
    "diverged": lambda run: diverged(run, "pretrain", 1, NotFinite("nan"), nn.Linear(1, 1), {"x": torch.zeros(1)}),
    "snapshots": lambda run: snapshot_path(run, 3),
    "analyses": lambda run: run.write_analysis("gate", {}),
    "tensorboard": lambda run: track_with(run, "tensorboard"),
    "trackio": lambda run: track_with(run, "trackio"),
    "wandb": lambda run: track_with(run, "wandb"),
    "metrics.jsonl": lambda run: run.log_metrics("pretrain", 1, loss=1.0),
    "summary.json": lambda run: run.write_summary({}),
    "seed-0": lambda run: seed_folders(run.path),
    "seed-1": lambda run: SweepJob(1, 0.1).finished(run.path),
    "seed-2": lambda run: StudyJob("run", 2).finished(run.path),
    "study": lambda run: StudyJob("compile", 0).finished(run.path),
}


@pytest.mark.parametrize("name", WRITES)
def test_no_link_leads_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    run, outside = RunFolder(tmp_path / "run"), tmp_path / "outside"
    run.path.mkdir()
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (run.path / name).symlink_to(outside / "mine" if "." in name else outside)
    with pytest.raises(UserError, match=r"leads to .*outside.*, out of"):
        WRITES[name](run)
    assert os.listdir(outside) == ["mine"]
    assert (outside / "mine").read_text() == "mine"


def test_what_ends_a_job_is_written_and_read_in_its_folder_alone(tmp_path: Path) -> None:
    job, outside = tmp_path / "job", tmp_path / "outside"
    outside.write_text("mine")
    job.mkdir()
    assert failure_read(job) is None
    (job / "error.txt").symlink_to(outside)
    assert failure_read(job) is None
    write_failure(job, ValueError("no luck"))
    assert failure_read(job) == "ValueError: no luck"
    assert outside.read_text() == "mine"
