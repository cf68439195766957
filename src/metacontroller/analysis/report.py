"""A report to open in a browser: one HTML file that needs no network, with tables, figures and a trajectory player."""

from __future__ import annotations

import html
import io
import json
import os
import statistics
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.analysis import figures
from metacontroller.analysis.study_figures import BASELINES, CONTROLS, study_figures
from metacontroller.analysis.summary import variant_rows
from metacontroller.envs.tasks import format_task
from metacontroller.errors import UserError
from metacontroller.phases.reproduce import LoadedRun, gate_of_run, gate_to_draw, load_run
from metacontroller.presets.gridworld import stream_seed, subgoals
from metacontroller.run_folder import RunFolder

PLAYER_EPISODES = 8
NOT_MEASURED = "not measured"

PAPER: tuple[tuple[str, str, Callable[[dict[str, Any], list[RunFolder]], list[Any]]], ...] = (
    (
        "internal RL on the post-training task (Fig. 8)",
        "high within a million episodes",
        lambda summary, runs: summary["internal_rl_success"],
    ),
    (
        "raw-action RL (Fig. 8)",
        "near 0, from about 1e-6",
        lambda summary, runs: summary["raw_action_success"],
    ),
    (
        "gate meets subgoal changes: recall (Fig. 6)",
        "spikes where the subgoal changes",
        lambda summary, runs: summary["gate_recall"],
    ),
    ("gate: precision (Fig. 6)", "near 0 elsewhere", lambda summary, runs: summary["gate_precision"]),
    (
        "linear probe of the subgoal at the input (Fig. 3)",
        "about 0.3",
        lambda summary, runs: [found["accuracy"][0] for found in _analyses(runs, "probes")],
    ),
    (
        "the same at the best layer (Fig. 3)",
        "about 0.5 by mid-depth",
        lambda summary, runs: [max(found["accuracy"]) for found in _analyses(runs, "probes")],
    ),
    (
        "supervised controllers at the best layer, chained (Fig. 4)",
        "0.5 to 0.7, near mid-depth",
        lambda summary, runs: [max(found["success"]) for found in _analyses(runs, "steering")],
    ),
    (
        "code forced in mid-episode (Fig. A4, ant)",
        "36% instead of 23%",
        lambda summary, runs: [found["forced"] for found in _analyses(runs, "injection")],
    ),
    (
        "the same over unseen transitions (Fig. A4, ant)",
        "24% instead of 10%",
        lambda summary, runs: [found["forced_unseen"] for found in _analyses(runs, "injection")],
    ),
)
"""What is compared: a name, what the paper says of it, and our values over seeds."""


def write_report(paths: Sequence[Path], out: Path, *, device: str = "cpu") -> Path:
    """Writes the report on reproductions, one folder each, to the file ``out``; replaced only when it is whole.

    ValueError for a folder that is no finished reproduction.
    """
    figures.require_matplotlib()
    parts, players = [], []
    for path in paths:
        folder = RunFolder(path)
        summary = folder.read_summary()
        if not summary.get("seeds"):
            raise UserError(
                f"{path} holds no finished reproduction; run `metacontroller reproduce --out {path}` first."
            )
        runs = [RunFolder(path / f"seed-{seed}") for seed in summary["seeds"]]
        first = load_run(runs[0], device)
        parts.append(_section(folder, summary, runs, first))
        players.append(player_data(first))
    page = resources.files("metacontroller.analysis").joinpath("report.html").read_text(encoding="utf-8")
    data = json.dumps(players).replace("</", "<\\/")  # a script's text may not end the script
    page = page.replace("<!--CONTENT-->", "\n".join(parts)).replace("<!--DATA-->", data)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, out)
    return out


def _analyses(runs: Sequence[RunFolder], name: str) -> list[dict[str, Any]]:
    """What the seeds have of an analysis."""
    return [found for run in runs if (found := run.read_analysis(name))]


def _section(folder: RunFolder, summary: dict[str, Any], runs: list[RunFolder], first: LoadedRun) -> str:
    """One reproduction; first: its first run."""
    name, seeds, config = folder.path.name, len(runs), first.config
    drawn = {
        "Success against episodes, median and quartiles over seeds": figures.success_figure(runs, config),
        "Gate and true subgoal changes, first seed": figures.gate_figure(gate_to_draw(first), _names(first)),
        "Losses, first seed": figures.losses_figure(first.folder),
        "What a fixed code leads to, first seed": figures.measured_codes_figure(config, first.folder.read_summary()),
        **dict(study_figures(folder, runs).values()),
    }
    lines = [f"<h2>{html.escape(name)}: {seeds} seed{'s' if seeds > 1 else ''}</h2>"]
    lines.append("<table><tr><th>measure</th><th>the paper</th><th>here: median [quartiles]</th></tr>")
    found = [(label, said, values(summary, runs)) for label, said, values in PAPER]
    studied = variant_rows(RunFolder(folder.path / "study").read_summary())
    compared = {name: (label, "near 0") for name, (label, _) in BASELINES.items()}
    compared |= {name: said for name, said in CONTROLS.items() if name in studied}
    for variant, (label, said) in compared.items():
        values = [row["internal_rl_success"] for row in studied.get(variant, [])]
        found.append((f"{label}: internal RL on it (Fig. 8)", said, values))
    for label, said, values in found:
        lines.append(f"<tr><td>{label}</td><td>{said}</td><td>{_spread(values)}</td></tr>")
    lines.append("</table>")
    for caption, figure in drawn.items():
        lines.append(f"<figure>{_svg(figure)}<figcaption>{caption}</figcaption></figure>")
    lines.append(_player(name))
    lines.append(_cost(summary))
    shown = html.escape(json.dumps(first.folder.read_config(), indent=2))
    lines.append(f"<details><summary>Configuration, first seed</summary><pre>{shown}</pre></details>")
    return "\n".join(lines)


def _spread(values: list[Any]) -> str:
    """Median and quartiles of what was measured."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return NOT_MEASURED
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return f"{statistics.median(numbers):.3f} [{low:.3f}, {high:.3f}]"


def _cost(summary: dict[str, Any]) -> str:
    """Minutes, memory, versions and hardware."""
    facts = {
        "episodes of reinforcement learning": f"{summary['episodes']:,}",
        "minutes a seed": ", ".join(f"{seconds / 60:.1f}" for seconds in summary["seconds"]),
        "peak memory": f"{summary['peak_rss_mb']:,.0f} MB",
        **{f"version of {name}": value for name, value in summary.get("versions", {}).items()},
        **summary.get("hardware", {}),
    }
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<h3>Cost, versions, hardware</h3><table>{rows}</table>"


def _svg(figure: Any) -> str:
    """A figure as inline vector graphics."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _player(name: str) -> str:
    """The player's elements; the page's script fills them."""
    panels = (("grid", 280, 280), ("gate", 360, 110), ("code", 180, 180), ("belief", 170, 190))
    drawn = "".join(
        f'<figure><svg data-part="{part}" width="{width}" height="{height}"></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
        for (part, width, height), caption in zip(
            panels, ("grid", "gate β; dashed: true changes", "code, two main axes", "probe's belief"), strict=True
        )
    )
    return (
        "<h3>Episodes of experts, as the metacontroller sees them</h3>"
        f'<div class="player-root" aria-label="{html.escape(name)}">'
        '<div class="controls"><select data-part="episode"></select> <button data-part="back">&#9664;</button> '
        '<button data-part="play">play</button> <button data-part="forth">&#9654;</button> '
        '<input data-part="step" type="range" min="0" value="0"> <span class="now" data-part="now"></span></div>'
        f'<div class="player">{drawn}</div></div>'
    )


@torch.no_grad()
def player_data(run: LoadedRun) -> dict[str, Any]:
    """New episodes of experts, with gate, code in its two main axes, true subgoal, and the probe's belief if there is
    one: lists with an entry a step, ready for JSON."""
    config, names = run.config, _names(run)
    gate = gate_of_run(run, PLAYER_EPISODES, stream_seed(run.seed, "analyse"))
    batch = gate.episodes
    assert batch.subgoals is not None
    code = main_axes(gate.code, batch.mask())
    belief = _belief(run, batch.states, batch.actions)
    episodes = []
    for row, length in enumerate(batch.lengths.tolist()):
        goals = batch.subgoals[row, :length].tolist()
        changes = [goal for t, goal in enumerate(goals) if t == 0 or goal != goals[t - 1]]
        episodes.append(
            {
                "task": "-".join(names[goal] for goal in changes),
                "objects": batch.states[row, 0, :-1].tolist(),
                "agents": batch.states[row, : length + 1, -1].tolist(),
                "subgoals": goals,
                "gate": _rounded(gate.beta[row, :length]),
                "code": _rounded(code[row, :length]),
                "belief": None if belief is None else _rounded(belief[row, :length]),
            }
        )
    grid = {"size": config.environment.size, "colors": config.environment.num_colors}
    return {**grid, "names": names, "episodes": episodes}


def _names(run: LoadedRun) -> list[str]:
    """What the run's subgoals are called."""
    return [format_task(subgoal) for subgoal in subgoals(run.config)]


def main_axes(z: Tensor, mask: Tensor) -> Tensor:
    """Codes (b, t, n_z) in the two directions in which those of real steps vary most, (b, t, 2)."""
    center = z[mask].mean(0)
    axes = torch.linalg.svd(z[mask] - center, full_matrices=False).Vh[:2]
    flat = (z - center) @ axes.T
    return torch.nn.functional.pad(flat, (0, 2 - flat.shape[-1]))


def _belief(run: LoadedRun, states: Tensor, actions: Tensor) -> Tensor | None:
    """(b, t, subgoals): what the base model's probe at the controlled layer makes of each step; None without probes."""
    if not run.folder.has_checkpoint("probes"):
        return None
    tensors, _ = run.folder.load_checkpoint("probes", states.device)
    model = run.base.eval()
    layer = len(model.lower_body.blocks)
    weight, bias = tensors[f"probes.{layer}.weight"], tensors[f"probes.{layer}.bias"]
    return nn.functional.linear(model.residual(states, actions), weight, bias).softmax(-1)


def _rounded(values: Tensor) -> Any:
    """Nested lists of numbers with four decimals: the page should stay small."""
    return (values.double() * 1e4).round().div(1e4).tolist()
