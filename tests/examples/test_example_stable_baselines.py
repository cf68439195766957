"""The example for Stable-Baselines3 runs: both algorithms, and copies of `InternalEnv`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers import load_script, untrained_run

if importlib.util.find_spec("stable_baselines3") is None:
    pytest.skip("stable-baselines3 is not installed (extra expert)", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "examples" / "stable_baselines.py"


@pytest.fixture
def script() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with modules that learned nothing."""
    return untrained_run(tmp_path).path


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--algorithm", "ppo"], ["--algorithm", "sac"], ["--copies", "2"]])
def test_it_trains_and_writes_its_curve(
    options: list[str], script: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "WINDOW", 16)
    output = run / "curve.json"
    words = ["--episodes", "48", "--rows", "8", "--decisions", "64", *options, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["stable_baselines.py", str(run), *words])
    script.main()
    points = json.loads(output.read_text())["points"]
    assert [point["episodes"] for point in points] == [16, 32, 48]
    assert all(0 <= point["success"] <= 1 for point in points)
