from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from metacontroller.analysis.summary import RESULTS, combined_summary, environment_facts, results_table


def run(seed: int, success: float) -> dict[str, Any]:
    """A seed's summary with made-up numbers."""
    values = {**dict.fromkeys(RESULTS, 0.5), "internal_rl_success": success}
    return {"seed": seed, **values, "episodes": 1000, "seconds": 60.0 * seed, "phase_seconds": {}, "peak_rss_mb": seed}


def shown(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table(summary))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_measures_become_lists_over_seeds() -> None:
    summary = combined_summary([run(1, 0.25), run(4, 0.75)])
    assert summary["seeds"] == [1, 4]
    assert summary["internal_rl_success"] == [0.25, 0.75]
    assert summary["seconds"] == [60.0, 240.0]
    assert summary["peak_rss_mb"] == 4
    assert summary["episodes"] == 1000


def test_the_table_shows_medians_and_ranges() -> None:
    lines = shown(combined_summary([run(1, 0.9), run(2, 0.1), run(3, 0.3)])).splitlines()
    success = next(line for line in lines if "internal RL" in line)
    assert "0.300" in success
    assert "0.100 to 0.900" in success
    assert any("minutes" in line and "2.0" in line for line in lines)


def test_one_seed_has_no_range_and_a_missing_value_no_row() -> None:
    text = shown({**combined_summary([run(1, 0.9)]), "gate_recall": [None]})
    assert " to " not in text
    assert "recall" not in text


def test_facts_name_versions_and_hardware_only() -> None:
    facts = environment_facts()
    assert set(facts) == {"versions", "hardware"}
    assert set(facts["versions"]) == {"python", "metacontroller-rl", "torch", "numpy"}
    assert set(facts["hardware"]) == {"cpu", "cores", "gpu", "bfloat16"}
    assert facts["versions"]["torch"] == pytest.importorskip("torch").__version__
