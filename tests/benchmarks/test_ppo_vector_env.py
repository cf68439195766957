"""The script that times PPO on both environments, at a size at which nothing is learned."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import untrained_run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ppo_vector_env.py"


@pytest.mark.slow
def test_both_are_trained_and_compared(tmp_path: Path) -> None:
    if importlib.util.find_spec("stable_baselines3") is None:
        pytest.skip("stable-baselines3 is not installed (extra expert)")
    untrained_run(tmp_path)
    output = tmp_path / "ppo.json"
    words = ["--seeds", "0", "--limit", "1", "--decisions", "64", "--rows", "16", "--output", str(output)]
    done = subprocess.run([sys.executable, SCRIPT, str(tmp_path), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert list(report["results"]) == ["InternalVectorEnv, 16 rows", "InternalEnv x 8"]
    assert all(result["episodes"] > 0 and not result["reached"] for (result,) in report["results"].values())
    assert "some did not reach the goal" in done.stdout
