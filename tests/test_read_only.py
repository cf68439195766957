"""A run that one may only read is measured all the same, and what could not be kept is said."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from helpers import untrained_run
from metacontroller import cli
from metacontroller.storage import files
from metacontroller.storage.run_folder import RunFolder

EVALUATE = ["evaluate", "--policy", "prior", "--episodes", "4", "--device", "cpu"]
EPISODES = ["episodes", "--episodes", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return untrained_run(tmp_path_factory.mktemp("read") / "run")


def refuse(monkeypatch: pytest.MonkeyPatch, run: RunFolder, number: int) -> None:
    """Nothing may be written in the run, whoever asks: the superuser, too, as on a disk that is mounted to be read."""
    make = files._new_folder

    def refused(path: Path) -> Path:
        if path.is_relative_to(run.path):
            raise OSError(number, os.strerror(number), str(path))
        return make(path)

    monkeypatch.setattr(files, "_new_folder", refused)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_an_evaluation_is_printed_and_not_kept(
    run: RunFolder, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch, run, number)
    assert cli.main([*EVALUATE, str(run.path), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["episodes"] == 4
    last = f"metacontroller: {run.path} may only be read: analyses/evaluation-prior.json could not be kept."
    assert said.err.splitlines()[-1] == last
    assert run.read_analysis("evaluation-prior") == {}


def test_an_analysis_is_printed_and_its_file_and_figure_are_not_kept(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch, run, errno.EROFS)
    assert cli.main([*EPISODES, str(run.path), "--json"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["episodes"]) == 2
    assert "may only be read: analyses/episodes.json could not be kept." in said.err


def test_a_report_of_it_is_written_elsewhere(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metacontroller.report.html._svg", lambda figure: "<svg></svg>")
    run.log_metrics("pretrain", 1, action_loss=1.0)
    refuse(monkeypatch, run, errno.EROFS)
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "report.html"), "--device", "cpu"]) == 0
    assert "analyses/episodes.json could not be kept" in capsys.readouterr().err
    assert (tmp_path / "report.html").exists()


def test_training_still_ends_there_and_so_does_a_full_disk(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, run, errno.EROFS)
    with pytest.raises(OSError, match="Read-only"):
        run.write_analysis("gate", {})
    reader = RunFolder(run.path)
    reader.unkept = []
    assert reader.write_analysis("gate", {"recall": float("nan")}) == {"recall": None}
    assert reader.unkept == ["analyses/gate.json"]
    refuse(monkeypatch, run, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        reader.write_analysis("gate", {})
