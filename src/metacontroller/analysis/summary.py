"""What a reproduction adds up to: lists over seeds, versions and hardware, a table of medians."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from metacontroller.precision import prefers_bfloat16

RESULTS = {
    "internal_rl_success": "internal RL: success on the post-training task",
    "raw_action_success": "raw-action RL: success, as many episodes",
    "prior_success": "codes from the prior: success",
    "raw_initial_success": "base model unsteered: success",
    "gate_recall": "gate: recall of subgoal changes, within ±1 step",
    "gate_precision": "gate: precision",
    "gate_binary_fraction": "gate: share of β outside (0.1, 0.9)",
    "code_subgoal_bits": "a fixed code tells of the subgoal reached, bits",
    "unseen_transition_share": "base model: unseen among transitions",
}
"""The measures of a run, and how the table names them."""


def combined_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summaries of several seeds as one: each measure a list over seeds.

    episodes are those of one seed's RL; peak_rss_mb is the largest.
    """
    return {
        "seeds": [run["seed"] for run in runs],
        **{name: [run[name] for run in runs] for name in RESULTS},
        "episodes": runs[0]["episodes"],
        "seconds": [run["seconds"] for run in runs],
        "phase_seconds": [run["phase_seconds"] for run in runs],
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
    }


def environment_facts() -> dict[str, Any]:
    """Versions and hardware that a result was made with; bfloat16: where precision "auto" multiplies in it."""
    versions = {name: _version(name) for name in ("metacontroller-rl", "torch", "numpy")}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "bfloat16": {device: prefers_bfloat16(device) for device in ("cpu", "cuda")},
        },
    }


def results_table(summary: Mapping[str, Any]) -> Table:
    """Medians and ranges over seeds."""
    seeds = len(summary["seeds"])
    table = Table(title=f"{seeds} seed{'s' if seeds > 1 else ''}, {summary['episodes']:,} episodes of RL")
    table.add_column("measure")
    table.add_column("median", justify="right")
    if seeds > 1:
        table.add_column("range", justify="right")
    for name, label in RESULTS.items():
        values = [value for value in summary[name] if value is not None]
        if values:
            _add_row(table, label, values, "{:.3f}")
    _add_row(table, "minutes", [seconds / 60 for seconds in summary["seconds"]], "{:.1f}")
    table.add_row("peak memory, MB", f"{summary['peak_rss_mb']:.0f}")
    return table


def variant_rows(summary: Mapping[str, Any], group: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """The finished rows of a study's summary, by variant, of one group or of all."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in summary.get("cells", []):
        if row["status"] == "finished" and "group" in row and group in (None, row["group"]):
            found.setdefault(row["name"], []).append(row)
    return found


def _add_row(table: Table, label: str, values: Sequence[float], form: str) -> None:
    cells = [form.format(statistics.median(values))]
    if len(table.columns) > 2:
        cells.append(f"{form.format(min(values))} to {form.format(max(values))}")
    table.add_row(label, *cells)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
