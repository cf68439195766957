"""A report to open in a browser: one HTML file that needs no network, with tables, figures and a trajectory player."""

from __future__ import annotations

import base64
import html
import io
import json
import statistics
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.report import figures
from metacontroller.report.figures import NOT_MEASURED
from metacontroller.report.results import read_episodes, read_meaning, read_reproduction, read_results, read_study
from metacontroller.report.study_figures import BASELINES, CONTROLS, study_figures
from metacontroller.report.tables import POLICIES, evaluation_name, variant_rows
from metacontroller.storage.files import read_regular
from metacontroller.storage.manifest import write_text
from metacontroller.storage.run_folder import RunFolder

MAX_PICTURE_BYTES = 64 * 2**20

PAPER: tuple[tuple[str, str, Callable[[dict[str, Any], list[RunFolder]], list[Any]]], ...] = (
    (
        "internal RL on the post-training task (Fig. 8)",
        "high within a million episodes",
        lambda summary, runs: summary.get("internal_rl_success", []),
    ),
    (
        "raw-action RL (Fig. 8)",
        "near 0, from about 1e-6",
        lambda summary, runs: summary.get("raw_action_success", []),
    ),
    (
        "gate against subgoal changes: recall (Fig. 6)",
        "spikes where the subgoal changes",
        lambda summary, runs: summary.get("gate_recall", []),
    ),
    ("gate: precision (Fig. 6)", "near 0 elsewhere", lambda summary, runs: summary.get("gate_precision", [])),
    (
        "linear probe of the subgoal at the input (Fig. 3)",
        "about 0.3",
        lambda summary, runs: [results["accuracy"][0] for results in read_results(runs, "probes")],
    ),
    (
        "the same at the best layer (Fig. 3)",
        "about 0.5 by mid-depth",
        lambda summary, runs: [_best(results["accuracy"]) for results in read_results(runs, "probes")],
    ),
    (
        "supervised controllers at the best layer, chained (Fig. 4)",
        "0.5 to 0.7, near mid-depth",
        lambda summary, runs: [_best(results["success"]) for results in read_results(runs, "steering")],
    ),
    (
        "code forced in mid-episode (Fig. A4, ant)",
        "36% instead of 23%",
        lambda summary, runs: [results.get("forced") for results in read_results(runs, "injection")],
    ),
    (
        "the same over unseen transitions (Fig. A4, ant)",
        "24% instead of 10%",
        lambda summary, runs: [results.get("forced_unseen") for results in read_results(runs, "injection")],
    ),
)
"""What is compared: a name, what the paper says of it, and our values over seeds."""


@checked_kinds
def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Writes the report on reproductions or runs, one folder each, to the file ``out``; replaced only when it is whole.

    UserError for a folder that is neither a finished reproduction nor a run, and for results of another shape. Nothing
    is read that a link leads to out of its folder, and all that files say is escaped.
    """
    figures.require_matplotlib()
    parts, players = [], []
    for path in paths:
        folder = RunFolder(path)
        summary = read_reproduction(folder)
        if summary:
            runs = [folder.child(f"seed-{seed}") for seed in summary["seeds"]]
            parts.append(_section(folder, summary, runs))
        elif folder.read_metrics():
            runs = [folder]
            parts.append(_run_section(folder))
        else:
            raise UserError(
                f"{path} holds no finished reproduction; run `metacontroller reproduce --out {path}` first, or name a "
                "run."
            )
        if episodes := read_episodes(runs[0]):
            players.append(episodes)
    page = resources.files("metacontroller.report").joinpath("report.html").read_text(encoding="utf-8")
    data = json.dumps(players).replace("<", r"\u003c")  # a script's text may neither end the script nor begin a comment
    write_text(out, page.replace("<!--CONTENT-->", "\n".join(parts)).replace("<!--DATA-->", data))
    return out


def _escaped(value: Any) -> str:
    """Anything as text of a page."""
    return html.escape(str(value))


def _row(cells: Sequence[Any], tag: str = "td") -> str:
    """One line of a table."""
    return f"<tr>{''.join(f'<{tag}>{_escaped(cell)}</{tag}>' for cell in cells)}</tr>"


def _drawn(caption: str, picture: str) -> str:
    return f"<figure>{picture}<figcaption>{_escaped(caption)}</figcaption></figure>"


def _best(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _section(folder: RunFolder, summary: dict[str, Any], runs: list[RunFolder]) -> str:
    """One reproduction."""
    name, seeds, first = folder.path.name, len(runs), runs[0]
    episodes, studied_figures = read_episodes(first), study_figures(folder, runs)
    task = summary.get("task") or "post-training task"
    drawn = {
        "Success against episodes, median and quartiles over seeds": figures.success_figure(runs, task),
        "Gate and true subgoal changes, first seed": figures.gate_figure(episodes),
        "Losses, first seed": figures.losses_figure(first),
        "What a fixed code leads to, first seed": figures.measured_codes_figure(read_meaning(first)),
        **dict(studied_figures.values()),
    }
    lines = [f"<h2>{_escaped(name)}: {seeds} seed{'s' if seeds > 1 else ''}</h2>", "<table>"]
    lines.append(_row(("measure", "the paper", "here: median [quartiles]"), "th"))
    compared = [(label, said, values(summary, runs)) for label, said, values in PAPER]
    studied = variant_rows(read_study(folder))
    variants = {name: (label, "near 0") for name, (label, _) in BASELINES.items()}
    variants |= {name: said for name, said in CONTROLS.items() if name in studied}
    for variant, (label, said) in variants.items():
        values = [row.get("internal_rl_success") for row in studied.get(variant, [])]
        compared.append((f"{label}: internal RL on it (Fig. 8)", said, values))
    lines += [_row((label, said, _spread(values))) for label, said, values in compared]
    lines.append("</table>")
    lines += [_drawn(caption, _svg(figure)) for caption, figure in drawn.items()]
    lines += _film(first)
    lines += _other_figures(folder, {"success", "gate", *studied_figures})
    lines.append("<h3>Episodes of experts, as the metacontroller sees them</h3>")
    lines.append(_player(name) if episodes else f"<p>{NOT_MEASURED}</p>")
    lines.append(_cost(summary))
    shown = _escaped(json.dumps(first.read_config(), indent=2))
    lines.append(f"<details><summary>Configuration, first seed</summary><pre>{shown}</pre></details>")
    return "\n".join(lines)


def _run_section(run: RunFolder) -> str:
    """One run that was made phase by phase: what `evaluate` has measured of it, its figures, its episodes."""
    name, evaluated = run.path.name, {policy: read_results([run], evaluation_name(policy)) for policy in POLICIES}
    task = next((results["task"] for found in evaluated.values() for results in found), "post-training task")
    lines = [f"<h2>{_escaped(name)}</h2>", "<table>"]
    lines.append(_row(("who acts", "success", "return", "steps", "decisions", "episodes", "lost"), "th"))
    for policy, label in POLICIES.items():
        found = evaluated[policy]
        lines.append(_row([label, *(_evaluation_cells(found[0]) if found else [NOT_MEASURED] + [""] * 5)]))
    lines.append("</table><p>± one standard error of the mean over held-out episodes.</p>")
    episodes = read_episodes(run)
    drawn = {
        "Success against episodes": figures.success_figure([run], task),
        "Return against episodes": figures.return_figure(run),
        "Gate in episodes of the data": figures.gate_figure(episodes),
        "Losses": figures.losses_figure(run),
    }
    lines += [_drawn(caption, _svg(figure)) for caption, figure in drawn.items()]
    lines.append("<h3>Episodes of the data, as the metacontroller sees them</h3>")
    lines.append(_player(name) if episodes else f"<p>{NOT_MEASURED}</p>")
    shown = _escaped(json.dumps(run.read_config(), indent=2))
    lines.append(f"<details><summary>Configuration</summary><pre>{shown}</pre></details>")
    return "\n".join(lines)


def _evaluation_cells(results: dict[str, Any]) -> list[str]:
    """Success, return, steps, decisions, episodes and lost ones of an evaluation."""

    def cell(name: str, form: str) -> str:
        value = results.get(name)
        return "" if value is None else form.format(value)

    return [
        cell("success", "{:.3f}") + cell("success_se", " ± {:.2g}"),
        cell("mean_return", "{:.4g}") + cell("return_se", " ± {:.2g}"),
        cell("steps", "{:.1f}"),
        cell("decisions", "{:.1f}"),
        cell("episodes", "{}"),
        cell("lost", "{}"),
    ]


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
        **{f"version of {name}": value for name, value in (summary.get("versions") or {}).items()},
        **(summary.get("hardware") or {}),
    }
    return f"<h3>Cost, versions, hardware</h3><table>{''.join(map(_row, facts.items()))}</table>"


def _svg(figure: Any) -> str:
    """A figure as inline vector graphics."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _other_figures(folder: RunFolder, known: set[str]) -> list[str]:
    """The figures that analyses of other packages have left in the folder, as pictures."""
    names = sorted(path.stem for path in folder.within("figures").glob("*.png") if path.stem not in known)
    return [line for name in names for line in _picture(folder, f"{name}.png", name)]


def _film(run: RunFolder) -> list[str]:
    """The film that `reproduce` has left of a run, if it could make one."""
    if not (run.path / "figures" / figures.FILM).exists():
        return []
    caption = "Two episodes of internal RL, first seed; below, the gate, in a new color for each abstract action"
    return _picture(run, figures.FILM, caption)


def _picture(folder: RunFolder, name: str, caption: str) -> list[str]:
    """A picture of the folder's figures; a sentence in its place where that is no regular file of the folder."""
    content = read_regular(folder.path, folder.path / "figures" / name, MAX_PICTURE_BYTES)
    if content is None:
        return [f"<p>{_escaped(name)} is no regular file of this folder, or too large, and is not shown.</p>"]
    data = base64.b64encode(content).decode()
    return [_drawn(caption, f'<img src="data:image/{Path(name).suffix[1:]};base64,{data}" alt="">')]


def _player(name: str) -> str:
    """The player's elements; the page's script fills them."""
    panels = (
        ("gate", 360, 110, "gate β; dashed: true changes"),
        ("code", 180, 180, "code, two main axes"),
        ("belief", 170, 190, "probe's belief"),
    )
    drawn = "".join(
        f'<figure><svg data-part="{part}" width="{width}" height="{height}"></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
        for part, width, height, caption in panels
    )
    picture = (
        '<figure><img data-part="picture" alt="what there is to see"><p data-part="no-picture">no pictures</p>'
        "<figcaption>episode</figcaption></figure>"
    )
    return (
        f'<div class="player-root" aria-label="{_escaped(name)}">'
        '<div class="controls"><select data-part="episode"></select> <button data-part="back">&#9664;</button> '
        '<button data-part="play">play</button> <button data-part="forth">&#9654;</button> '
        '<input data-part="step" type="range" min="0" value="0"> <span class="now" data-part="now"></span></div>'
        f'<div class="player">{picture}{drawn}</div></div>'
    )
