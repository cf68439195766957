"""PNG figures of a run, in RUN/figures. Needs matplotlib (the extra `viz`), which is imported only when drawing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metacontroller.analysis.switching import subgoal_changes
from metacontroller.envs.tasks import format_task
from metacontroller.errors import UserError
from metacontroller.phases.evaluate import HeldOutGate
from metacontroller.presets.gridworld import GridworldConfig, subgoals
from metacontroller.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from metacontroller.phases.reproduce import LoadedRun

GATE_EPISODES = 6


def require_matplotlib() -> None:
    """Raises ValueError, before hours are spent, if figures cannot be drawn at their end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed; figures need it: pip install 'metacontroller-rl[viz]'.")


def draw_run(run: LoadedRun, measured: dict[str, Any], gate: HeldOutGate) -> None:
    """All figures of one finished seed, ``gate`` along `GATE_EPISODES` held-out episodes."""
    folder = run.folder.path / "figures"
    save_figure(losses_figure(run.folder), folder / "losses.png")
    save_figure(gate_figure(gate, [format_task(subgoal) for subgoal in subgoals(run.config)]), folder / "gate.png")
    save_figure(success_figure([run.folder], run.config), folder / "success.png")
    save_figure(measured_codes_figure(run.config, measured), folder / "codes.png")


def draw_all(config: GridworldConfig, folder: RunFolder, runs: Sequence[RunFolder]) -> None:
    """Figures over all seeds."""
    save_figure(success_figure(runs, config), folder.path / "figures" / "success.png")


def losses_figure(run: RunFolder) -> Figure:
    """Pretraining and discovery: action loss against updates, and the KL that discovery pays."""
    figure = figure_of_size(9.0, 3.2)
    left, right = figure.subplots(1, 2)
    pretraining, discovery = run.read_metrics("pretrain"), run.read_metrics("discover")
    left.plot(_column(pretraining, "step"), _column(pretraining, "action_loss"), color="C0")
    left.set(title="Pretraining", xlabel="update", ylabel="action loss (nats per step)")
    steps = _column(discovery, "step")
    right.plot(steps, _column(discovery, "action_loss"), color="C0", label="action loss, steered")
    cost = "code_kl" if any("code_kl" in line for line in discovery) else "kl"  # CompILE's, the metacontroller's
    right.plot(steps, _column(discovery, cost), color="C1", label="KL of the codes")
    right.set(title="Discovery", xlabel="update", ylabel="nats per step", yscale="log")
    right.legend(frameon=False)
    return figure


def gate_figure(gate: HeldOutGate, names: Sequence[str]) -> Figure:
    """The gate over time against true subgoal changes, a held-out episode a row (as Fig. 6); names: of subgoals."""
    beta, fresh = gate.beta, gate.episodes
    assert fresh.segments is not None
    assert fresh.subgoals is not None
    changes = subgoal_changes(fresh.segments, fresh.lengths)
    figure = figure_of_size(8.0, 1.1 * len(beta) + 0.6)
    axes: Sequence[Axes] = figure.subplots(len(beta), 1, sharex=True, sharey=True)
    for row, ax in enumerate(axes):
        length = int(fresh.lengths[row])
        for change in changes[row, :length].nonzero().flatten().tolist():
            ax.axvline(change, color="C1", linestyle="--", linewidth=1.2)
        ax.plot(range(length), beta[row, :length].tolist(), color="C0", marker=".", linewidth=1.2)
        pursued = torch.unique_consecutive(fresh.subgoals[row, :length]).tolist()
        ax.set_ylabel("-".join(names[int(goal)] for goal in pursued), rotation=0, ha="right", va="center")
        ax.set(ylim=(-0.05, 1.05), yticks=(0, 1))
    axes[0].set_title("Switching gate β (solid) and true subgoal changes (dashed), one task a row")
    axes[-1].set_xlabel("environment step")
    return figure


def success_figure(runs: Sequence[RunFolder], config: GridworldConfig) -> Figure:
    """Success on the post-training task against episodes (as Fig. 8); over seeds the median and a band of quartiles."""
    figure = figure_of_size(5.6, 3.6)
    ax = figure.subplots()
    highest = 0.0
    for phase, label, color in (("internal_rl", "internal RL", "C0"), ("raw_action_rl", "raw-action RL", "C3")):
        highest = max(highest, median_and_quartiles(ax, [run.read_metrics(phase) for run in runs], label, color))
    ax.set(xlabel="episodes", ylabel="success rate", xlim=(0, None))
    top = 1.02 if highest > 0.2 else max(1.1 * highest, 0.05)
    ax.set_ylim(-0.02 * top, top)
    ax.set_title("Task " + "-".join(map(str, config.post_task)) + (f", {len(runs)} seeds" if len(runs) > 1 else ""))
    ax.legend(frameon=False)
    return figure


def median_and_quartiles(ax: Axes, logged: Sequence[list[dict[str, Any]]], label: str, color: str) -> float:
    """Draws success against episodes, one list of logged lines a seed; returns the highest value of any."""
    shared = min(len(lines) for lines in logged)
    episodes = _column(logged[0][:shared], "episodes")
    success = torch.tensor([_column(lines[:shared], "success") for lines in logged])
    low, median, high = success.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0).tolist()
    ax.plot(episodes, median, color=color, label=label)
    if len(logged) > 1:
        ax.fill_between(episodes, low, high, color=color, alpha=0.25, linewidth=0)
    return float(success.max())


def measured_codes_figure(config: GridworldConfig, summary: dict[str, Any]) -> Figure:
    """The figure of codes from what a run's summary holds of them."""
    names = [format_task(subgoal) for subgoal in subgoals(config)]
    return codes_figure(torch.tensor(summary["code_color_share"]), summary["code_subgoal_bits"], names)


def codes_figure(share: torch.Tensor, bits: float, names: Sequence[str]) -> Figure:
    """Which subgoal a held code reaches first: share (codes, outcomes), outcome 0 is none; names: of the others."""
    from matplotlib.ticker import MaxNLocator

    shown = share[:, [*range(1, len(names) + 1), 0]]
    favourite = shown.argmax(1)
    order = sorted(range(len(shown)), key=lambda code: (int(favourite[code]), -float(shown[code].max())))
    figure = figure_of_size(1.2 + 0.55 * len(names) + 1.6, 5.0)
    ax = figure.subplots()
    image = ax.imshow(shown[order].numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    ax.set_xticks(range(len(names) + 1), [*names, "none"])
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="subgoal reached first", ylabel="fixed code, by favourite subgoal", title=f"{bits:.2f} bits")
    figure.colorbar(image, ax=ax, label="share of new layouts")
    return figure


def layers_figure(runs: Sequence[RunFolder]) -> Figure:
    """By layer, probes (as Fig. 3) and chained supervised controllers (as Fig. 4), a thin line a seed and the median;
    and the probes' medians over pretraining, a line a layer (as Fig. A1)."""
    figure = figure_of_size(12.0, 3.2)
    left, middle, right = figure.subplots(1, 3)
    _by_layer(left, runs, "probes", "accuracy")
    left.set(title="Linear probe of the subgoal", ylabel="accuracy")
    _over_training(middle, runs)
    _by_layer(right, runs, "steering", "success")
    right.set(title="Supervised controllers, chained", ylabel="success rate")
    return figure


def _by_layer(ax: Axes, runs: Sequence[RunFolder], analysis: str, measure: str) -> None:
    found = [run.read_analysis(analysis).get(measure) for run in runs]
    lines = torch.tensor([values for values in found if values])
    ax.set(xlabel="layer (0: input embedding)", ylim=(-0.02, 1.02))
    if not len(lines):
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center")
        return
    layers = range(lines.shape[1])
    ax.plot(layers, lines.T.numpy(), color="C0", alpha=0.3, linewidth=0.8)
    ax.plot(layers, lines.quantile(0.5, dim=0).tolist(), color="C0", marker=".")
    ax.set_xticks(list(layers))


def _over_training(ax: Axes, runs: Sequence[RunFolder]) -> None:
    found = [run.read_analysis("probes").get("over_training") for run in runs]
    found = [values for values in found if values]
    ax.set(title="The same over pretraining", xlabel="update", ylabel="accuracy", ylim=(-0.02, 1.02))
    if not found:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center")
        return
    accuracy = torch.tensor([values["accuracy"] for values in found]).quantile(0.5, dim=0)  # (snapshots, layers)
    for layer, line in enumerate(accuracy.T.tolist()):
        ax.plot(found[0]["steps"], line, marker=".", label=f"layer {layer}")
    ax.legend(frameon=False, fontsize="small")


def draw_layers(folder: RunFolder, runs: Sequence[RunFolder]) -> None:
    """The figure of probes and supervised controllers, from what the runs hold of them."""
    save_figure(layers_figure(runs), folder.path / "figures" / "layers.png")


def figure_of_size(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    require_matplotlib()
    from matplotlib.figure import Figure  # its own canvas is Agg: no display is needed

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _column(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float("nan") if line[name] is None else line[name] for line in lines]
