"""Tables of results: of reproductions, evaluations, analyses, studies and sweeps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

RESULTS = {
    "internal_rl_success": "internal RL: success on the post-training task",
    "raw_action_success": "raw-action RL: success, as many episodes",
    "prior_success": "codes from the prior: success",
    "raw_initial_success": "base model unsteered: success",
    "gate_recall": "gate: recall of subgoal changes, within the world's tolerance",
    "gate_precision": "gate: precision",
    "gate_binary_fraction": "gate: share of β outside (0.1, 0.9)",
    "code_subgoal_bits": "a fixed code tells of the subgoal reached, bits",
    "unseen_transition_share": "base model: unseen among transitions",
    "probe_accuracy": "linear probe of the subgoal: accuracy",
    "supervised_success": "supervised controllers, chained: success",
    "named_success": "mean codes of subgoals, chained: success",
    "oracle_seen": "codes of experts, seen tasks: success",
    "oracle_unseen": "codes of experts, post-training task: success",
    "code_nats": "a code costs, nats",
    "code_dimensions": "dimensions of the code in use",
    "pretrain_action_loss": "pretraining: action loss in training, nats a step",
    "pretrain_val_action_loss": "pretraining: the same, held out",
    "discover_action_loss": "discovery: action loss in training, nats a step",
    "discover_val_action_loss": "discovery: the same, held out",
}
"""The measures of a run, and how the table names them."""

MEASURES = ("internal_rl_success", "gate_recall", "gate_precision", "gate_binary_fraction", "code_subgoal_bits")
"""Those by which the runs of a sweep are compared."""


POLICIES = {
    "internal-rl": "internal RL",
    "evolved": "evolution",
    "prior": "codes from the prior",
    "raw": "raw-action RL",
    "base": "base model unsteered",
}
"""Who acted in an evaluation, and how tables name it."""


def evaluation_name(policy: str) -> str:
    """The name under which a run folder holds the evaluation of a policy."""
    return f"evaluation-{policy}"


def results_table(summary: Mapping[str, Any]) -> Table:
    """Medians and ranges over seeds."""
    seeds = len(summary["seeds"])
    table = Table(title=f"{seeds} seed{'s' if seeds > 1 else ''}, {summary['episodes']:,} episodes of RL")
    table.add_column("measure")
    for title in ("median", "range")[: 1 + (seeds > 1)]:
        table.add_column(title, justify="right")

    def add_row(label: str, values: Sequence[float], form: str) -> None:
        cells = [form.format(statistics.median(values)), f"{form.format(min(values))} to {form.format(max(values))}"]
        table.add_row(label, *cells[: 1 + (seeds > 1)])

    for name, label in RESULTS.items():
        if values := [value for value in summary.get(name, []) if value is not None]:
            add_row(label, values, "{:.3f}")
    add_row("minutes", [seconds / 60 for seconds in summary["seconds"]], "{:.1f}")
    table.add_row("peak memory, MB", f"{summary['peak_rss_mb']:.0f}")
    return table


def evaluation_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """All numbers and words of each result, one column a run; without what no run has."""
    rows = [(name, [result[name] for result in results]) for name in results[0] if name != "run"]
    return analysis_table(results, [row for row in rows if any(value is not None for value in row[1])])


def analysis_table(results: Sequence[Mapping[str, Any]], rows: Sequence[tuple[str, Sequence[Any]]]) -> Table:
    """One line a row, a name and a value for each of the results; one column a run, headed by its "run"."""
    table = Table()
    table.add_column("measure")
    for result in results:
        table.add_column(result["run"], justify="right")
    for name, values in rows:
        table.add_row(name, *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    return table


def finished_rows(summary: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The finished rows of a study's summary, a list for each of its runs by name."""
    finished: dict[str, list[dict[str, Any]]] = {}
    for row in summary.get("jobs", []):
        if row["status"] == "finished" and "group" in row:
            finished.setdefault(row["name"], []).append(row)
    return finished


def study_table(summary: Mapping[str, Any]) -> Table:
    """One line a run of a study's summary, medians over its seeds."""
    table = Table(title=f"{summary['seconds'] / 60:.0f} minutes of one core")
    titles = {"internal_rl_success": "success", "gate_recall": "recall", "gate_precision": "precision"}
    titles |= {"rate": "rate", "distortion": "distortion"}
    for title in ("variant", "seeds", *titles.values()):
        table.add_column(title, justify="left" if title == "variant" else "right", overflow="fold")
    for name, rows in finished_rows(summary).items():
        measured = [[row[measure] for row in rows if row.get(measure) is not None] for measure in titles]
        table.add_row(name, str(len(rows)), *(f"{statistics.median(each):.3f}" if each else "" for each in measured))
    return table


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a job; what was varied in full, so that no two lines look alike."""
    table = Table()
    titles: dict[str, str] = dict(zip(MEASURES, ("success", "recall", "precision", "binary", "bits"), strict=True))
    for name in rows[0]:
        style: Any = {"justify": "left", "min_width": 8} if name == "status" else {"justify": "right"}
        table.add_column(titles.get(name, name), overflow="fold", **style)
    for row in rows:
        table.add_row(
            *(f"{row[name]:.3g}" if name in MEASURES and row[name] is not None else str(row[name]) for name in row)
        )
    return table
