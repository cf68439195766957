"""Analyses by name: what a command, a study and a report loop over.

An analysis is a subclass of `Analysis` under the decorator `analysis`, in a module of this package, or of another that
an entry point of the group ``metacontroller.analyses`` names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from metacontroller import analysis as package
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.ranges import Rows, check_fields
from metacontroller.report.figures import save_figure
from metacontroller.report.results import read_results
from metacontroller.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = "metacontroller.analyses"

Results = dict[str, Any]
"""What an analysis leaves: numbers, strings, lists and objects, as JSON has them."""

TableRows = list[tuple[str, list[Any]]]
"""Lines of a table: a name, and a value for each run, None where there is none."""


class Analysis:
    """What runs models of one run and leaves its results in ``analyses/NAME.json``.

    ``Config``: a frozen dataclass of options, each with a default; their names are flags of the command, beside run,
    json, quiet and device. The first line of the class's docstring is what the command line says of it.
    """

    name: ClassVar[str]
    command: ClassVar[str]
    figure: ClassVar[str]
    file: ClassVar[str]
    needs_labels: ClassVar[bool] = True
    Config: ClassVar[type]

    def measure(self, run: LoadedRun, config: Any, *, quiet: bool = False) -> Results:
        """Runs it. NaN becomes null in the file."""
        raise NotImplementedError

    def draw(self, results: Sequence[Results]) -> Figure | None:
        """A figure of the results of one or several runs; None if there is nothing to draw."""
        return None

    def rows(self, results: Sequence[Results]) -> TableRows:
        """Lines of a table of the results of one or several runs: here, of all that are single numbers."""
        numbers = [name for name, value in results[0].items() if isinstance(value, int | float | None)]
        return [(name, [result.get(name) for result in results]) for name in numbers]


@dataclass(frozen=True, kw_only=True)
class EpisodesConfig:
    """How much is judged."""

    episodes: Rows = 2048
    """Held-out episodes to judge by."""

    def __post_init__(self) -> None:
        check_fields(self)


Kind = TypeVar("Kind", bound=type[Analysis])

_REGISTERED: dict[str, type[Analysis]] = {}


def analysis(
    name: str, *, command: str, figure: str, needs_labels: bool = True, file: str | None = None
) -> Callable[[Kind], Kind]:
    """Registers a class under a name.

    command: its word on the command line. figure: the paper's, such as "3, A1". needs_labels: whether it needs subgoals
    in the demonstrations. file: of its figure, without .png; the name unless given.
    """

    def register(kind: Kind) -> Kind:
        known = _REGISTERED.get(name, kind)
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise UserError(f"analysis {name!r} is defined in {known.__module__} and {kind.__module__}; rename one.")
        kind.name, kind.command, kind.figure, kind.needs_labels = name, command, figure, needs_labels
        kind.file = name if file is None else file
        _REGISTERED[name] = kind
        return kind

    return register


def analyses() -> dict[str, Analysis]:
    """All analyses by name, in the order of their names."""
    for module in sorted(part.name for part in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    for point in entry_points(group=GROUP):
        point.load()
    return {name: kind() for name, kind in sorted(_REGISTERED.items())}


@checked_kinds
def run_analysis(name: str, run: LoadedRun, config: Any = None, *, quiet: bool = False) -> Results:
    """Runs one analysis of one run, writes analyses/NAME.json and returns what that holds.

    config: of the analysis, its defaults unless given. UserError for an unknown name, and where the analysis needs
    labels that the world's demonstrations lack.
    """
    known = analyses()
    if name not in known:
        raise UserError(f"analysis {name!r} is unknown; known are {', '.join(known)}.")
    chosen = known[name]
    if chosen.needs_labels and not run.subgoals:
        world = run.domain.name
        needed = f"{name} needs the subgoal of each step, and the demonstrations of {world} carry none"
        raise UserError(f"{needed}; give a world whose demonstrations are labelled.")
    config = chosen.Config() if config is None else config
    return run.folder.write_analysis(name, chosen.measure(run, config, quiet=quiet))


@checked_kinds
def draw_analysis(name: str, folder: RunFolder, runs: Sequence[RunFolder]) -> None:
    """Draws the results that the runs hold of an analysis into the folder's figures, if there is something to draw."""
    results = read_results(runs, name)
    chosen = analyses()[name]
    figure = chosen.draw(results) if results else None
    if figure is not None:
        save_figure(figure, folder, chosen.file)
