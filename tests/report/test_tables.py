from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from metacontroller.recipes.machine import environment_facts
from metacontroller.recipes.reproduce import combined_summary
from metacontroller.report.tables import (
    RESULTS,
    analysis_table,
    evaluation_table,
    results_table,
    study_table,
    sweep_table,
)


def run(seed: int, success: float) -> dict[str, Any]:
    """A seed's summary with made-up numbers."""
    values = {**dict.fromkeys(RESULTS, 0.5), "internal_rl_success": success}
    said = {"task": "0-1", "subgoals": ["0", "1"], "phase_seconds": {}}
    return {"seed": seed, **values, **said, "episodes": 1000, "seconds": 60.0 * seed, "peak_rss_mb": seed}


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def shown(summary: dict[str, Any]) -> str:
    return printed(results_table(summary))


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


def test_results_have_a_column_a_run() -> None:
    results = [{"run": "seed-0", "success": 0.25, "task": "0-1"}, {"run": "seed-1", "success": 0.75, "task": "0-1"}]
    head, success, task = (
        line for line in printed(evaluation_table(results)).splitlines() if any(map(str.isalpha, line))
    )
    assert "seed-0" in head
    assert "seed-1" in head
    assert "0.25" in success
    assert "0.75" in success
    assert task.count("0-1") == 2
    text = printed(analysis_table(results, [("recall within 1 steps", [0.5, None])]))
    assert "recall within 1 steps" in text
    assert "None" in text
    assert "success" not in text


def test_a_study_is_shown_by_variant_and_a_sweep_by_job() -> None:
    rows = [
        {"name": "frozen", "seed": seed, "status": "finished", "group": "baseline", "rate": rate, "gate_recall": None}
        for seed, rate in enumerate((0.125, 0.5, 0.375))
    ]
    failed = {"name": "lost", "seed": 0, "status": "failed: no", "group": "baseline"}
    text = printed(study_table({"jobs": [*rows, failed], "seconds": 120.0}))
    (line,) = (line for line in text.splitlines() if "frozen" in line)
    assert "0.375" in line
    assert "lost" not in text
    assert "2 minutes" in text
    assert "failed: no" in printed(sweep_table([{"seed": 0, "alpha": 0.1, "status": "failed: no"}]))


def test_rows_of_a_sweep_that_differ_in_the_last_digits_look_different() -> None:
    rows = [{"seed": 0, "alpha": alpha, "internal_rl_success": 0.123456} for alpha in (0.1, 0.1000001)]
    text = printed(sweep_table(rows))
    assert "0.1000001" in text
    assert text.count("0.123 ") == 2


def test_facts_name_versions_and_hardware_only() -> None:
    facts = environment_facts()
    assert set(facts) == {"versions", "hardware"}
    assert set(facts["versions"]) == {"python", "metacontroller-rl", "torch", "numpy"}
    assert set(facts["hardware"]) == {"cpu", "cores", "gpu", "bfloat16"}
    assert facts["versions"]["torch"] == pytest.importorskip("torch").__version__
