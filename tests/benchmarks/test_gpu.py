"""The GPU script: what it says without a GPU, and all of it on a CPU with the debug preset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = call("--out", str(tmp_path / "gpu"), "--run", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "gpu" / "README.md").read_text()
    assert page.count("not measured") == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_script_runs_and_goes_on(tmp_path: Path) -> None:
    out, run = tmp_path / "gpu", tmp_path / "run"
    words = ["--device", "cpu", "--preset", "debug", "--repeats", "0", "--out", str(out), "--run", str(run)]
    short = call(*words, "--minutes", "0.001")  # interrupted before it can finish
    assert short.returncode == 0, short.stderr
    assert json.loads((out / "run.json").read_text())["summary"] == "not measured"
    done = call(*words, "--minutes", "2")
    assert done.returncode == 0, done.stderr
    state = json.loads((out / "run.json").read_text())
    assert state["phases"]["internal_rl"]["step"] == 6
    assert state["summary"]["seeds"] == [0]
    parity = json.loads((out / "parity.json").read_text())["parity"]
    assert set(parity.values()) == {0.0}  # the CPU beside itself
    assert "| internal_rl | 6 |" in (out / "README.md").read_text()
