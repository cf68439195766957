"""PNG figures of a run, in RUN/figures, drawn from its files. Needs matplotlib (the extra `viz`), imported only when
drawing."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metacontroller.errors import UserError, last_line
from metacontroller.storage.manifest import replacing
from metacontroller.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GATE_EPISODES = 6
"""Episodes in the figure of the gate."""

FILM = "episodes.gif"
"""What `reproduce` calls its film, in RUN/figures."""

NOT_MEASURED = "not measured"

MOST = 1e30
"""Of what can be drawn; axes of larger numbers overflow."""

RL = {"internal_rl": ("internal RL", "C0"), "raw_action_rl": ("raw-action RL", "C3")}
"""Phases of reinforcement learning, their names and colors."""


def require_matplotlib() -> None:
    """Raises UserError, before hours are spent, if figures cannot be drawn at their end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed; figures need it: pip install 'metacontroller-rl[viz]'.")
    try:
        importlib.import_module("matplotlib")
    except Exception as error:  # of MPLBACKEND, or of a file of its settings
        raise UserError(f"matplotlib cannot be imported ({last_line(error)}); mend its settings.") from error


def draw_run(run: RunFolder, measured: Mapping[str, Any]) -> None:
    """All figures of one finished seed. measured: what its summary holds."""
    save_figure(losses_figure(run), run, "losses")
    save_figure(gate_figure(run.read_analysis("episodes")), run, "gate")
    save_figure(success_figure([run], measured["task"]), run, "success")
    save_figure(measured_codes_figure(measured), run, "codes")


def draw_all(folder: RunFolder, runs: Sequence[RunFolder], task: str) -> None:
    """Figures over all seeds."""
    save_figure(success_figure(runs, task), folder, "success")


def losses_figure(run: RunFolder) -> Figure:
    """Pretraining and discovery: action loss against updates, and the KL that discovery pays."""
    figure, (left, right) = panels(9.0, 3.2, columns=2)
    pretraining, discovery = run.read_metrics("pretrain"), run.read_metrics("discover")
    cost = "code_kl" if any("code_kl" in line for line in discovery) else "kl"  # CompILE's, the metacontroller's
    curves: list[tuple[Axes, list[dict[str, Any]], str, dict[str, Any]]] = [
        (left, pretraining, "action_loss", {"color": "C0", "label": "in training"}),
        (left, pretraining, "val_action_loss", {"color": "C0", "linestyle": "--", "label": "held out"}),
        (right, discovery, "action_loss", {"color": "C0", "label": "action loss, steered"}),
        (right, discovery, cost, {"color": "C1", "label": "KL of the codes"}),
        (right, discovery, "val_action_loss", {"color": "C0", "linestyle": "--", "label": "the same, held out"}),
    ]
    for ax, lines, name, style in curves:
        if not name.startswith("val_") or any(name in line for line in lines):
            ax.plot(_column(lines, "step"), _column(lines, name), **style)
    left.set(title="Pretraining", xlabel="update", ylabel="action loss (nats per step)")
    right.set(title="Discovery", xlabel="update", ylabel="nats per step")
    if any((np.asarray(line.get_ydata()) <= 0).any() for line in right.get_lines()):  # densities may be above 1
        right.set_yscale("symlog", linthresh=0.1)
    else:
        right.set_yscale("log")
    for ax in (left, right):
        if len(ax.lines) > 1:
            ax.legend(frameon=False)
    return figure


def gate_figure(analysed: Mapping[str, Any]) -> Figure:
    """The gate over time against true subgoal changes, a held-out episode a row (as Fig. 6).

    analysed: what analyses/episodes.json holds; nothing if it has not been made.
    """
    episodes = analysed.get("episodes", [])[:GATE_EPISODES]
    rows = max(len(episodes), 1)
    figure, axes = panels(8.0, 1.1 * rows + 0.6, rows=rows, sharex=True, sharey=True)
    if not episodes:
        say_not_measured(axes[0])
    for episode, ax in zip(episodes, axes, strict=False):
        for change in episode["changes"] or []:
            ax.axvline(change, color="C1", linestyle="--", linewidth=1.2)
        ax.plot(range(len(episode["gate"])), episode["gate"], color="C0", marker=".", linewidth=1.2)
        ax.set_ylabel(plain(episode["task"]), rotation=0, ha="right", va="center")
        ax.set(ylim=(-0.05, 1.05), yticks=(0, 1))
    figure.suptitle("Switching gate β (solid) and true subgoal changes (dashed), one task a row", fontsize="large")
    axes[-1].set_xlabel("environment step")
    return figure


def success_figure(runs: Sequence[RunFolder], task: str) -> Figure:
    """Success on the post-training task against episodes (as Fig. 8); over seeds the median and a band of quartiles.

    task: as text.
    """
    figure, (ax,) = panels(5.6, 3.6)
    highest = max(median_and_quartiles(ax, runs, phase, *style) for phase, style in RL.items())
    top = 1.02 if highest > 0.2 else max(1.1 * highest, 0.05)
    ax.set(xlabel="episodes", ylabel="success rate", xlim=(0, None), ylim=(-0.02 * top, top))
    ax.set_title(f"Task: {plain(task)}" + (f", {len(runs)} seeds" if len(runs) > 1 else ""))
    add_legend(ax)
    return figure


def return_figure(run: RunFolder) -> Figure:
    """Mean return against episodes, of both kinds of RL, of one run."""
    figure, (ax,) = panels(5.6, 3.6)
    for phase, (label, color) in RL.items():
        if lines := run.read_metrics(phase):
            ax.plot(_column(lines, "episodes"), _column(lines, "return"), color=color, label=label)
    ax.set(xlabel="episodes", ylabel="return", xlim=(0, None), title="Mean return of a batch")
    add_legend(ax)
    return figure


def median_and_quartiles(ax: Axes, runs: Sequence[RunFolder], phase: str, label: str, color: str) -> float:
    """Draws success against episodes over the runs that have logged some; returns the highest value of any, or 0."""
    logged = [lines for run in runs if (lines := run.read_metrics(phase))]
    if not logged:
        return 0.0
    shared = min(map(len, logged))
    episodes = _column(logged[0][:shared], "episodes")
    success = torch.tensor([_column(lines[:shared], "success") for lines in logged])
    low, median, high = success.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0).tolist()
    ax.plot(episodes, median, color=color, label=label)
    if len(logged) > 1:
        ax.fill_between(episodes, low, high, color=color, alpha=0.25, linewidth=0)
    return max(0.0, float(success.max()))


def measured_codes_figure(measured: Mapping[str, Any]) -> Figure:
    """The figure of codes from what a run's summary holds of them, see `results.read_meaning`."""
    if measured.get("code_subgoal_share") is None:
        figure, (ax,) = panels(4.0, 2.0)
        say_not_measured(ax)
        return figure
    share = torch.tensor(measured["code_subgoal_share"])
    return codes_figure(share, measured["code_subgoal_bits"], measured["subgoals"])


def codes_figure(share: torch.Tensor, bits: float, names: Sequence[str]) -> Figure:
    """Which subgoal a fixed code reaches first: share (codes, outcomes), outcome 0 is none; names: of the others."""
    from matplotlib.ticker import MaxNLocator

    shown = share[:, [*range(1, len(names) + 1), 0]]
    favourite = shown.argmax(1)
    order = sorted(range(len(shown)), key=lambda code: (int(favourite[code]), -float(shown[code].max())))
    figure, (ax,) = panels(1.2 + 0.55 * len(names) + 1.6, 5.0)
    image = ax.imshow(shown[order].numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    ax.set_xticks(range(len(names) + 1), [*map(plain, names), "none"])
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="subgoal reached first", ylabel="fixed code, by favourite subgoal", title=f"{bits:.2f} bits")
    figure.colorbar(image, ax=ax, label="share of held-out episodes")
    return figure


# -- what all figures share -------------------------------------------------------------------------------------------


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure, in inches, and its panels row by row. options: of matplotlib's `subplots`."""
    require_matplotlib()
    from matplotlib.figure import Figure  # its own canvas is Agg: no display is needed

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def say_not_measured(ax: Axes) -> None:
    """Writes so in the middle of a panel."""
    ax.text(0.5, 0.5, NOT_MEASURED, transform=ax.transAxes, ha="center")


def add_legend(ax: Axes, **options: Any) -> None:
    """A legend of the lines of a panel; where there is none, it says that nothing was measured."""
    if ax.lines:
        ax.legend(frameon=False, **options)
    else:
        say_not_measured(ax)


def save_figure(figure: Figure, folder: RunFolder, name: str) -> None:
    """As figures/NAME.png; replaced only when it is whole."""
    path = folder.within(f"figures/{name}.png")
    with folder.keeping(f"figures/{name}.png"), replacing(path) as draft:
        figure.savefig(draft, dpi=150, format="png")


def plain(text: str) -> str:
    """Text that a figure shows as it is, dollars too, which would begin a formula."""
    return text.replace("$", r"\$")


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return numbers([line.get(name) for line in lines])


def numbers(values: Sequence[float | None]) -> list[float]:
    """NaN where nothing was measured, or what cannot be drawn."""
    return [math.nan if value is None or abs(value) > MOST else float(value) for value in values]
