"""A report to open in a browser: one HTML file that needs no network, with tables, figures and a trajectory player."""

from __future__ import annotations

import base64
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.report import figures
from metacontroller.report.figures import NOT_MEASURED
from metacontroller.report.results import read_episodes, read_meaning, read_reproduction, read_results, read_study
from metacontroller.report.study_figures import BASELINES, CONTROLS, study_figures
from metacontroller.report.tables import POLICIES, evaluation_name, finished_rows
from metacontroller.storage.files import read_regular
from metacontroller.storage.manifest import write_text
from metacontroller.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PICTURE_BYTES = 64 * 2**20
Values = Callable[[dict[str, Any], list[RunFolder]], list[Any]]
"""A measure over seeds, from a reproduction's summary and runs."""


def _of(name: str) -> Values:
    return lambda summary, _: summary.get(name, [])


def _at_input(_: dict[str, Any], runs: list[RunFolder]) -> list[Any]:
    return [results["accuracy"][0] for results in read_results(runs, "probes")]


def _best(analysis: str, name: str) -> Values:
    """The values at the best layer."""

    def values(_: dict[str, Any], runs: list[RunFolder]) -> list[Any]:
        layers = [results[name] for results in read_results(runs, analysis)]
        return [max((value for value in line if value is not None), default=None) for line in layers]

    return values


def _forced(name: str) -> Values:
    return lambda _, runs: [results.get(name) for results in read_results(runs, "injection")]


PAPER: tuple[tuple[str, str, Values], ...] = (
    ("internal RL on the post-training task (Fig. 8)", "high within a million episodes", _of("internal_rl_success")),
    ("raw-action RL (Fig. 8)", "near 0, from about 1e-6", _of("raw_action_success")),
    ("gate against subgoal changes: recall (Fig. 6)", "spikes where the subgoal changes", _of("gate_recall")),
    ("gate: precision (Fig. 6)", "near 0 elsewhere", _of("gate_precision")),
    ("linear probe of the subgoal at the input (Fig. 3)", "about 0.3", _at_input),
    ("the same at the best layer (Fig. 3)", "about 0.5 by mid-depth", _best("probes", "accuracy")),
    (
        "supervised controllers at the best layer, chained (Fig. 4)",
        "0.5 to 0.7, near mid-depth",
        _best("steering", "success"),
    ),
    ("code forced in mid-episode (Fig. A4, ant)", "36% instead of 23%", _forced("forced")),
    ("the same over unseen transitions (Fig. A4, ant)", "24% instead of 10%", _forced("forced_unseen")),
)
"""What is compared: a name, what the paper says of it, and our values over seeds."""


@dataclass(kw_only=True)
class Section:
    """What the page says of one folder. table: lines, the first of which is its head. figures: by their captions.
    pictures: files of figures, captions, and what is in them as a link, "" where that is not shown. source: whose
    episodes the player shows, and those. which: run the configuration is of."""

    title: str
    table: list[Sequence[Any]]
    note: str = ""
    figures: dict[str, Figure]
    pictures: list[tuple[str, str, str]] = field(default_factory=list)
    source: str
    episodes: dict[str, Any]
    cost: list[Sequence[Any]] = field(default_factory=list)
    which: str = ""
    config: str


@checked_kinds
def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Writes the report on reproductions or runs, one folder each, to the file ``out``; replaced only when it is whole.

    UserError for a folder that is neither a finished reproduction nor a run, and for results of another shape. Nothing
    is read that a link leads to out of its folder, and all that files say is escaped.
    """
    figures.require_matplotlib()
    sections = []
    for folder in map(RunFolder, paths):
        if summary := read_reproduction(folder):
            sections.append(_reproduction(folder, summary))
        elif folder.read_metrics():
            sections.append(_run(folder))
        else:
            raise UserError(
                f"{folder.path} holds no finished reproduction; run `metacontroller reproduce --out {folder.path}` "
                "first, or name a run."
            )
    players = [section.episodes for section in sections if section.episodes]
    page = Environment(loader=PackageLoader("metacontroller.report", ""), autoescape=True, trim_blocks=True)
    drawn = {"svg": lambda figure: Markup(_svg(figure))}
    write_text(out, page.get_template("report.html").render(sections=sections, players=players, **drawn) + "\n")
    return out


def _reproduction(folder: RunFolder, summary: dict[str, Any]) -> Section:
    """One reproduction, and its study if it has begun."""
    runs = [folder.child(f"seed-{seed}") for seed in summary["seeds"]]
    first, task = runs[0], summary.get("task") or "post-training task"
    episodes, drawn = read_episodes(first), study_figures(folder, runs)
    others = (path.stem for path in folder.within("figures").glob("*.png"))  # some of analyses of other packages
    pictures = [(f"{name}.png", name) for name in sorted(others) if name not in {"success", "gate", *drawn}]
    pictures = [_picture(folder, *picture) for picture in pictures]
    if (first.path / "figures" / figures.FILM).exists():
        film = "Two episodes of internal RL, first seed; below, the gate, in a new color for each abstract action"
        pictures.insert(0, _picture(first, figures.FILM, film))
    return Section(
        title=f"{folder.path.name}: {len(runs)} seed{'s' if len(runs) > 1 else ''}",
        table=[("measure", "the paper", "here: median [quartiles]"), *_compared(folder, summary, runs)],
        figures={
            "Success against episodes, median and quartiles over seeds": figures.success_figure(runs, task),
            "Gate and true subgoal changes, first seed": figures.gate_figure(episodes),
            "Losses, first seed": figures.losses_figure(first),
            "What a fixed code leads to, first seed": figures.measured_codes_figure(read_meaning(first)),
            **dict(drawn.values()),
        },
        pictures=pictures,
        source="experts",
        episodes=episodes,
        cost=[
            ("what", "how much"),
            ("episodes of reinforcement learning", f"{summary['episodes']:,}"),
            ("minutes a seed", ", ".join(f"{seconds / 60:.1f}" for seconds in summary["seconds"])),
            ("peak memory", f"{summary['peak_rss_mb']:,.0f} MB"),
            *((f"version of {name}", version) for name, version in (summary.get("versions") or {}).items()),
            *(summary.get("hardware") or {}).items(),
        ],
        which=", first seed",
        config=json.dumps(first.read_config(), indent=2),
    )


def _compared(folder: RunFolder, summary: dict[str, Any], runs: list[RunFolder]) -> list[tuple[str, str, str]]:
    """What the paper reports, and the study's baselines and controls: what the paper says, and ours."""
    studied = finished_rows(read_study(folder))
    compared = [(label, paper, values(summary, runs)) for label, paper, values in PAPER]
    added = {name: (label, "near 0") for name, (label, _) in BASELINES.items()}
    added |= {name: control for name, control in CONTROLS.items() if name in studied}
    for name, (label, paper) in added.items():
        values = [row.get("internal_rl_success") for row in studied.get(name, [])]
        compared.append((f"{label}: internal RL on it (Fig. 8)", paper, values))
    return [(label, paper, _spread(values)) for label, paper, values in compared]


def _run(run: RunFolder) -> Section:
    """One run that was made phase by phase: what `evaluate` has measured of it, its figures, its episodes."""
    evaluated = {policy: next(iter(read_results([run], evaluation_name(policy))), {}) for policy in POLICIES}
    task = next((results["task"] for results in evaluated.values() if results), "post-training task")
    episodes = read_episodes(run)
    return Section(
        title=run.path.name,
        table=[
            ("who acts", "success", "return", "steps", "decisions", "episodes", "lost"),
            *((label, *_evaluation_cells(evaluated[policy])) for policy, label in POLICIES.items()),
        ],
        note="± one standard error of the mean over held-out episodes.",
        figures={
            "Success against episodes": figures.success_figure([run], task),
            "Return against episodes": figures.return_figure(run),
            "Gate in episodes of the data": figures.gate_figure(episodes),
            "Losses": figures.losses_figure(run),
        },
        source="the data",
        episodes=episodes,
        config=json.dumps(run.read_config(), indent=2),
    )


def _evaluation_cells(results: dict[str, Any]) -> list[str]:
    """Success, return, steps, decisions, episodes and lost ones of an evaluation, if there is one."""
    forms = {"success": "{:.3f}", "success_se": " ± {:.2g}", "mean_return": "{:.4g}", "return_se": " ± {:.2g}"}
    forms |= {"steps": "{:.1f}", "decisions": "{:.1f}", "episodes": "{}", "lost": "{}"}
    cells = {name: "" if results.get(name) is None else form.format(results[name]) for name, form in forms.items()}
    cells["success"] += cells.pop("success_se")
    cells["mean_return"] += cells.pop("return_se")
    return list(cells.values()) if results else [NOT_MEASURED, *[""] * 5]


def _spread(values: list[Any]) -> str:
    """Median and quartiles of what was measured."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return NOT_MEASURED
    if len(numbers) == 1:
        return f"{numbers[0]:.3f}"
    low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def _picture(folder: RunFolder, name: str, caption: str) -> tuple[str, str, str]:
    """A picture of the folder's figures for a `Section`."""
    content = read_regular(folder.path, folder.path / "figures" / name, MAX_PICTURE_BYTES)
    data = None if content is None else base64.b64encode(content).decode()
    return name, caption, "" if data is None else f"data:image/{Path(name).suffix[1:]};base64,{data}"


def _svg(figure: Figure) -> str:
    """A figure as inline vector graphics."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
