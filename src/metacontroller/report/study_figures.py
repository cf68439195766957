"""Figures of a study: baselines (Fig. 8, A5), rate-distortion (Fig. 7), pretraining (A2), and those of its analyses.
Needs matplotlib, like `figures`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from metacontroller.report.analysis_figures import ANALYSIS_FIGURES
from metacontroller.report.figures import RL, median_and_quartiles, panels, save_figure, say_not_measured
from metacontroller.report.results import read_results, read_study
from metacontroller.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINES = {
    "compile": ("CompILE", "C1"),
    "forced-switching": ("forced switching", "C2"),
    "cotrained-from-pretrained": ("co-trained, from pretrained weights", "C4"),
    "cotrained-from-scratch": ("co-trained, from scratch", "C5"),
}
"""How the study's baselines are named and drawn."""

CONTROLS = {
    "unaugmented-frozen": ("base frozen, sequence embedder as the paper's", "high"),
    "unaugmented-cotrained-from-pretrained": ("co-trained, from pretrained weights, embedder as the paper's", "near 0"),
    "unaugmented-cotrained-from-scratch": ("co-trained, from scratch, embedder as the paper's", "near 0"),
}
"""The study's controls, and what the paper says of their success."""


def study_figures(folder: RunFolder, runs: Sequence[RunFolder]) -> dict[str, tuple[str, Figure]]:
    """What a reproduction's folder has beyond the reproduction: by file name, a caption and the figure."""
    drawn = {}
    for name, (file, caption, draw) in ANALYSIS_FIGURES.items():
        drawn[file] = (caption, draw(read_results(runs, name)))
    rows = read_study(folder).get("jobs", [])
    if rows:
        drawn |= {
            "baselines": ("Baselines, median and quartiles over seeds", baselines_figure(folder, runs)),
            "rate_distortion": ("Rate and distortion over α; a dot a run", rate_distortion_figure(rows)),
            "pretraining": ("What pretraining does to abstract actions", pretraining_figure(folder, rows)),
        }
    return drawn


def draw_study(folder: RunFolder, runs: Sequence[RunFolder]) -> None:
    """Writes them to the folder's figures."""
    for name, (_, figure) in study_figures(folder, runs).items():
        save_figure(figure, folder, name)


def baselines_figure(folder: RunFolder, runs: Sequence[RunFolder]) -> Figure:
    """Internal RL, raw-action RL and each baseline (as Fig. 8)."""
    figure, (ax,) = panels(9.0, 4.0)
    median_and_quartiles(ax, runs, "internal_rl", *RL["internal_rl"])
    for name, style in BASELINES.items():
        studied = [folder.child(f"study/{name}/{run.path.name}") for run in runs]
        median_and_quartiles(ax, studied, "internal_rl", *style)
    median_and_quartiles(ax, runs, "raw_action_rl", *RL["raw_action_rl"])
    ax.set(xlabel="episodes", ylabel="success rate", xlim=(0, None), ylim=(-0.02, 1.02))
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def rate_distortion_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Two curves over alpha, frozen and co-trained; stars are aligned with subgoals, by the rule (as Fig. 7)."""
    figure, (ax,) = panels(6.0, 4.0)
    for kind, label, color in (("frozen", "base frozen", "C0"), ("cotrained", "base co-trained", "C4")):
        wanted = [row for row in rows if row["name"].startswith(f"rate-{kind}-")]
        points = [row for row in wanted if None not in map(row.get, ("value", "rate", "distortion"))]
        if not points:
            continue
        alphas = sorted({row["value"] for row in points})
        middle = [_median_of([row for row in points if row["value"] == alpha]) for alpha in alphas]
        ax.plot([x for x, _ in middle], [y for _, y in middle], color=color, linewidth=1.0, label=label)
        for row in points:
            marker, size = ("*", 11) if row.get("aligned") else ("o", 4)
            ax.plot(row["rate"], row["distortion"], color=color, marker=marker, markersize=size)
        for alpha, place in zip(alphas, middle, strict=True):
            ax.annotate(f"α {alpha:g}", place, textcoords="offset points", xytext=(6, 5), fontsize="x-small")
    ax.plot([], [], color="0.3", marker="*", markersize=11, linestyle="", label="switches aligned with subgoals")
    ax.set(xlabel="rate: KL of the codes (nats per step)", ylabel="distortion: action loss (nats per step)")
    ax.set_xscale("symlog", linthresh=0.1)
    ax.margins(x=0.12)  # for the names of the last points
    low, high = ax.get_xlim()
    ticks = [tick for tick in (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize="small")
    return figure


def _median_of(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    return median(row["rate"] for row in rows), median(row["distortion"] for row in rows)


PRETRAINING_PANELS = (
    ("pretraining-steps-", "updates of pretraining"),
    ("weight-decay-", "weight decay"),
    ("state-loss-", "λ, weight of the state loss"),
    ("epsilon-", "ε, random moves of the expert"),
)


PRETRAINING_MEASURES = (
    ("internal_rl_success", "internal RL: success", "o"),
    ("gate_recall", "gate: recall", "^"),
    ("gate_precision", "gate: precision", "v"),
)


def pretraining_figure(folder: RunFolder, rows: Sequence[dict[str, Any]]) -> Figure:
    """Success of internal RL and the gate's recall and precision after each change of pretraining (as Fig. A2); those
    with other settings beside the preset's after as many updates."""
    figure, axes = panels(11.0, 3.0, columns=len(PRETRAINING_PANELS), sharey=True)
    steps = folder.child("study").read_config().get("pretraining_steps") if rows else None
    reference = [row for row in rows if row["name"] == f"pretraining-steps-{steps}" and "gate_recall" in row]
    for ax, (prefix, label) in zip(axes, PRETRAINING_PANELS, strict=True):
        changed = [row for row in rows if row["name"].startswith(prefix)]
        changed = [row for row in changed if None not in map(row.get, ("value", "gate_recall"))]
        ax.set(xlabel=label, ylim=(-0.03, 1.05))
        if not changed:
            say_not_measured(ax)
            continue
        points = [(f"{row['value']:g}", row) for row in sorted(changed, key=lambda row: row["value"])]
        if prefix != "pretraining-steps-":
            points = [*(("preset", row) for row in reference), *points]
        for measure, name, marker in PRETRAINING_MEASURES:
            shown = [(place, row[measure]) for place, row in points if row.get(measure) is not None]
            ax.plot([x for x, _ in shown], [y for _, y in shown], marker=marker, linestyle="", label=name, alpha=0.8)
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize="x-small")
    return figure
