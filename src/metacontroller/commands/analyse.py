"""Analyses of runs: what layers know, how they can be steered, what codes and the gate do. A command each."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any, ClassVar

from rich.table import Table
from tyro.conf import OmitArgPrefixes

from metacontroller.analysis.registry import Analysis, analyses, draw_analysis, run_analysis
from metacontroller.commands.options import Measuring, device_name, seed_folders, telling_unkept
from metacontroller.recipes.config import load_run
from metacontroller.report.figures import require_matplotlib
from metacontroller.report.tables import analysis_table
from metacontroller.storage.run_folder import RunFolder


@dataclass(kw_only=True)
class AnalysisCommand(Measuring):
    """What every analysis can be asked."""

    quiet: bool = False
    """Show no progress."""

    analysis: ClassVar[Analysis]
    config: ClassVar[Any]  # of the analysis: a field of each subclass

    def __call__(self) -> None:
        require_matplotlib()
        name, folder = self.analysis.name, RunFolder(self.run)
        runs, results = [RunFolder(path) for path in seed_folders(self.run)], []
        with telling_unkept(*runs, folder):
            for run in runs:
                loaded = load_run(run, device_name(self.device))
                results.append({"run": run.path.name, **run_analysis(name, loaded, self.config, quiet=self.quiet)})
            draw_analysis(name, folder, runs)
            self.print_results(results, self._table)

    def _table(self, results: list[dict[str, Any]]) -> Table:
        return analysis_table(results, self.analysis.rows(results))


def analysis_commands() -> dict[str, type[AnalysisCommand]]:
    """The commands of all analyses that are registered, by their word: each a dataclass of its options."""
    return {chosen.command: _command(chosen) for chosen in analyses().values()}


def _command(chosen: Analysis) -> type[AnalysisCommand]:
    """The command of one analysis; the options of its Config stand beside those of all."""
    config = ("config", OmitArgPrefixes[chosen.Config], field(default_factory=chosen.Config))
    namespace = {"analysis": chosen, "__doc__": type(chosen).__doc__}
    return make_dataclass(type(chosen).__name__, [config], bases=(AnalysisCommand,), namespace=namespace, kw_only=True)
