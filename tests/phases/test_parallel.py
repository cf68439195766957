"""Several processes on one batch: the losses and weights of one process, started as a user would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metacontroller.cli import main
from metacontroller.phases.parallel import Processes
from metacontroller.run_folder import RunFolder

PHASES = (["pretrain", "--preset", "debug", "--seed", "3"], ["discover"])


def in_two_processes(*words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "metacontroller.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for command in PHASES:
        assert main([command[0], str(alone), *command[1:], "--device", "cpu", "--quiet"]) == 0
        done = in_two_processes(command[0], str(together), *command[1:], "--device", "cpu")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("12/12") == 1  # one process shows progress
    one, two = RunFolder(alone), RunFolder(together)
    for phase in ("pretrain", "discover"):
        expected, lines = one.read_metrics(phase), two.read_metrics(phase)
        assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 6, 9, 12]
        for name in ("loss", "action_loss") if phase == "pretrain" else ("loss", "action_loss", "kl", "alpha"):
            assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-4)
        weights, reference = (run.load_checkpoint(phase)[0] for run in (two, one))
        for name, value in reference.items():
            if name.startswith("module."):
                torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


def test_other_commands_run_in_one_process_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["reproduce", "--preset", "debug"]) == 2
    assert "only pretrain and discover run in several processes" in capsys.readouterr().err


def test_a_batch_too_small_to_share_is_refused() -> None:
    workers = Processes("cpu")
    assert workers.rows(1) is None
    workers.count, workers.rank = 3, 1
    rows = workers.rows(8)
    assert rows is not None
    assert rows.tolist() == [1, 4, 7]
    with pytest.raises(ValueError, match="batch_size is 2; expected at least 3"):
        workers.rows(2)
