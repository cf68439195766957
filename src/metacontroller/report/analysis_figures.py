"""Figures of analyses, each of the results of several runs: probes (Fig. 3, A1), supervised controllers (Fig. 4),
histograms of the gate (A3), codes forced in mid-episode (A4). Without results they say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from metacontroller.metrics.switch_alignment import HISTOGRAM_BINS
from metacontroller.report.figures import add_legend, numbers, panels, say_not_measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]


def probes_figure(results: Sequence[Results]) -> Figure:
    """Accuracy of linear probes by layer, a thin line a run and the median (as Fig. 3); and the medians over
    pretraining, a line a layer (as Fig. A1)."""
    figure, (left, right) = panels(8.0, 3.2, columns=2)
    by_layer(left, [result["accuracy"] for result in results])
    left.set(title="Linear probe of the subgoal", ylabel="accuracy")
    over = [curves for result in results if (curves := result.get("over_training"))]
    right.set(title="The same over pretraining", xlabel="update", ylabel="accuracy", ylim=(-0.02, 1.02))
    if over:
        accuracy = torch.tensor([[numbers(line) for line in curves["accuracy"]] for curves in over])
        accuracy = accuracy.quantile(0.5, dim=0)  # (snapshots, layers)
        for layer, line in enumerate(accuracy.T.tolist()):
            right.plot(over[0]["steps"], line, marker=".", label=f"layer {layer}")
    add_legend(right, fontsize="small")
    return figure


def steering_figure(results: Sequence[Results]) -> Figure:
    """Success of chained supervised controllers by layer, a thin line a run and the median (as Fig. 4)."""
    figure, (ax,) = panels(4.2, 3.2)
    by_layer(ax, [result["success"] for result in results])
    ax.set(title="Supervised controllers, chained", ylabel="success rate")
    return figure


def by_layer(ax: Axes, lines: Sequence[Sequence[float | None]]) -> None:
    """Draws values in [0, 1] by layer, a thin line a run and the median."""
    ax.set(xlabel="layer (0: input embedding)", ylim=(-0.02, 1.02))
    if not lines:
        say_not_measured(ax)
        return
    values = torch.tensor([numbers(line) for line in lines])  # (runs, layers)
    layers = range(values.shape[1])
    ax.plot(layers, values.T.numpy(), color="C0", alpha=0.3, linewidth=0.8)
    ax.plot(layers, values.quantile(0.5, dim=0).tolist(), color="C0", marker=".")
    ax.set_xticks(list(layers))


def gate_histogram_figure(results: Sequence[Results]) -> Figure:
    """Histogram of beta where subgoals change and elsewhere, and precision, recall, F1 by tolerance (as Fig. A3)."""
    figure, (left, right) = panels(9.0, 3.2, columns=2)
    if not results:
        say_not_measured(left)
        say_not_measured(right)
        return figure
    edges = torch.linspace(0, 1, HISTOGRAM_BINS + 1)[:-1].tolist()
    for name, label, color in (("elsewhere", "elsewhere", "C7"), ("at_change", "at true changes", "C1")):
        share = torch.tensor([numbers(result[name]) for result in results]).mean(0)
        left.bar(edges, share.tolist(), 1 / HISTOGRAM_BINS, align="edge", label=label, color=color, alpha=0.7)
    left.set(xlabel="gate β", ylabel="share of steps", title="Histogram of the gate")
    left.legend(frameon=False)
    tolerance = results[0]["tolerance"]
    for name, marker in (("recall", "^"), ("precision", "v"), ("f1", "o")):
        values = torch.tensor([numbers(result[name]) for result in results]).quantile(0.5, dim=0)
        right.plot(tolerance, values.tolist(), marker=marker, label=name)
    right.set(xlabel="tolerance (steps)", ylim=(-0.02, 1.05), title="Against true subgoal changes", xticks=tolerance)
    right.legend(frameon=False)
    return figure


def injection_figure(results: Sequence[Results]) -> Figure:
    """Walks whose second subgoal is the one named, free and with its code forced (as Fig. A4); dots are runs."""
    figure, (ax,) = panels(5.0, 3.4)
    names = ("free", "forced", "free_unseen", "forced_unseen")
    for place, name in enumerate(names):
        values = [result[name] for result in results if result.get(name) is not None]
        if values:
            ax.bar(place, median(values), color="C0" if "forced" in name else "C7", alpha=0.7)
            ax.plot([place] * len(values), values, color="0.2", marker=".", linestyle="")
        else:
            ax.text(place, 0.02, "not\nmeasured", ha="center", fontsize="small")
    labels = ("all, free", "all, forced", "unseen, free", "unseen, forced")
    ax.set_xticks(range(len(names)), labels, fontsize="small")
    title = "A subgoal's code, forced after the first subgoal"
    ax.set(ylabel="second subgoal is the one named", ylim=(0, 1.02), title=title)
    return figure


ANALYSIS_FIGURES: dict[str, tuple[str, str, Callable[[Sequence[Results]], Figure]]] = {
    "probes": ("probes", "Probes by layer and over pretraining, medians and seeds", probes_figure),
    "steering": ("steering", "Supervised controllers by layer, median and seeds", steering_figure),
    "gate": ("gate_histogram", "The gate at true subgoal changes and elsewhere, all seeds", gate_histogram_figure),
    "injection": ("injection", "Codes forced in mid-episode; dots are seeds", injection_figure),
}
"""By analysis: the name of its figure's file, a caption, and what draws it from the results of all seeds."""
