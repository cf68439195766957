"""Results on standard output: tables, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from metacontroller.analysis.summary import variant_rows
from metacontroller.commands.options import seed_folders
from metacontroller.phases.sweep import MEASURES


def print_results(
    results: list[dict[str, Any]], folder: Path, table: Callable[[list[dict[str, Any]]], Table], *, as_json: bool
) -> None:
    """As a table, or as JSON: an object for a run's own folder, a list for a reproduction's."""
    if as_json:
        print(json.dumps(results[0] if seed_folders(folder) == [folder] else results, indent=2))
    else:
        Console().print(table(results))


def evaluation_table(results: Sequence[dict[str, Any]]) -> Table:
    """One column a run."""
    table = Table()
    table.add_column("measure")
    for result in results:
        table.add_column(result["run"], justify="right")
    for name in [name for name in results[0] if name != "run"]:
        values = [result[name] for result in results]
        table.add_row(name, *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    return table


def gate_table(results: Sequence[dict[str, Any]]) -> Table:
    """One line a tolerance and measure, one column a run."""
    table = Table()
    table.add_column("within, steps", justify="right")
    table.add_column("measure")
    for result in results:
        table.add_column(result["run"], justify="right")
    for index, tolerance in enumerate(results[0]["tolerance"]):
        for name in ("recall", "precision", "f1"):
            table.add_row(str(tolerance), name, *(f"{result[name][index]:.3f}" for result in results))
    return table


def layers_table(results: Sequence[dict[str, Any]]) -> Table:
    """One line a layer and measure, one column a run."""
    table = Table()
    table.add_column("measure")
    for result in results:
        table.add_column(result["run"], justify="right")
    for name, value in results[0].items():
        if isinstance(value, list):
            for layer in range(len(value)):
                table.add_row(f"{name}, layer {layer}", *(f"{result[name][layer]:.3f}" for result in results))
        elif isinstance(value, float):
            table.add_row(name, *(f"{result[name]:.3f}" for result in results))
    return table


def study_table(found: dict[str, Any]) -> Table:
    """One line a variant, medians over its seeds."""
    table = Table(title=f"{found['seconds'] / 60:.0f} minutes of one core")
    names = {
        "internal_rl_success": "success",
        "gate_recall": "recall",
        "gate_precision": "precision",
        "rate": "rate",
        "distortion": "distortion",
    }
    for title in ("variant", "seeds", *names.values()):
        table.add_column(title, justify="left" if title == "variant" else "right", overflow="fold")
    for name, rows in variant_rows(found).items():
        cells = [[row[measure] for row in rows if row.get(measure) is not None] for measure in names]
        table.add_row(name, str(len(rows)), *(f"{median(values):.3f}" if values else "" for values in cells))
    return table


def sweep_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a cell."""
    table = Table()
    short: dict[str, str] = dict(zip(MEASURES, ("success", "recall", "precision", "binary", "bits"), strict=True))
    for name in rows[0]:
        wordy = name == "status"
        table.add_column(
            short.get(name, name), justify="left" if wordy else "right", min_width=8 if wordy else None, overflow="fold"
        )
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table
