"""Whole experiments over seeds, and the page about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from metacontroller import presets
from metacontroller.analysis.registry import analyses, draw_analysis
from metacontroller.commands.options import (
    FromPreset,
    OnDevice,
    Tracked,
    Training,
    defaults_of,
    device_name,
    early_option,
    preset_config,
    seed_folders,
    telling_unkept,
)
from metacontroller.errors import UserError
from metacontroller.phases.artefacts import META_CONTROLLER, artefact_path
from metacontroller.recipes.config import load_run, open_folder
from metacontroller.recipes.jobs import Engine
from metacontroller.recipes.reproduce import reproduce, show_episodes
from metacontroller.recipes.study import study
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.recipes.sweep import alpha_of, sweep
from metacontroller.report.analysis_figures import ANALYSIS_FIGURES
from metacontroller.report.figures import require_matplotlib
from metacontroller.report.html import write_report
from metacontroller.report.results import read_reproduction
from metacontroller.report.study_figures import draw_study
from metacontroller.report.tables import results_table, study_table, sweep_table
from metacontroller.storage.run_folder import RunFolder


@dataclass(kw_only=True)
class Reproduce(FromPreset, Tracked):
    """Everything: all phases on every seed, the raw-action baseline, measures, figures and a table."""

    out: Path = Path("runs/reproduce")
    """Folder to make, or with --resume to continue in."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One run for each."""
    workers: int = 1
    """Seeds at the same time."""

    def __call__(self) -> None:
        summary = reproduce(
            self.chosen(self.config, RunFolder(self.out), resume=self.resume),
            self.out,
            self.seeds,
            resume=self.resume,
            workers=self.workers,
            quiet=self.quiet,
            device=device_name(self.device),
            track=self.track,
        )
        console = Console()
        console.print(results_table(summary))
        console.print(
            f"Summary: {self.out / 'summary.json'}", f"Figures: {self.out / 'figures'}", sep="\n", soft_wrap=True
        )


@dataclass(kw_only=True)
class Figures(FromPreset, OnDevice):
    """The paper's figures: the reproduction, every baseline and analysis on its seeds, and a report.

    What is finished is not run again.
    """

    out: Path = Path("runs/reproduce")
    """Folder to make, or of a reproduction to continue."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One run for each."""
    workers: int = 2
    """Jobs at the same time, one thread each."""
    quiet: bool = False
    """Show no progress."""
    study: StudyConfig = field(default_factory=StudyConfig)
    """How much of every baseline and analysis."""

    @classmethod
    def defaults(cls, words: Sequence[str]) -> Any:
        """The defaults of all options: --preset decides the study's too."""
        preset = early_option(words, "preset")
        study = presets.study_config(presets.DEFAULT if preset is None else preset)
        return defaults_of(cls, config=preset_config(preset), study=study)

    def __call__(self) -> None:
        require_matplotlib()
        folder, device = RunFolder(self.out), device_name(self.device)
        config = self.chosen(self.config, folder, resume=True)
        open_folder(folder, config, "figures", resume=True, option="--out")
        summary = study(self.study, self.out, self.seeds, workers=self.workers, quiet=self.quiet, device=device)
        failed = [row for row in summary["jobs"] if row["status"] != "finished"]
        if not any(row["name"] == "run" for row in failed):
            reproduce(config, self.out, self.seeds, resume=True, quiet=True, device=device)
            runs = [RunFolder(path) for path in seed_folders(self.out)]
            draw_study(folder, runs)
            for name in analyses().keys() - ANALYSIS_FIGURES.keys():
                draw_analysis(name, folder, runs)
            print(write_report([self.out], self.out / "report.html"))
        Console().print(study_table(summary))
        if failed:
            row = failed[0]
            raise UserError(
                f"{len(failed)} of {len(summary['jobs'])} jobs did not finish, such as {row['name']} of seed "
                f"{row['seed']}: {row['status']}"
            )


@dataclass(kw_only=True)
class Sweep(FromPreset, Training):
    """Seeds x alpha x learning rate of internal RL; what is finished is not run again, failures are named."""

    out: Path = Path("runs/sweep")
    """Folder to make, or with --resume to continue in."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One base model for each."""
    alphas: list[float] | None = None
    """Weights of the KL, a metacontroller for each; the preset's unless given. CompILE's two weights are both this."""
    lrs: list[float] | None = None
    """Learning rates of internal RL; the preset's unless given."""
    engine: Engine = "processes"
    """On this machine, by submitit on Slurm, or on a Ray cluster; all need one folder that every machine can reach."""
    workers: int = 1
    """Jobs at the same time; on Ray the cluster decides."""
    address: str | None = None
    """Of the Ray cluster; for Slurm, "local" tries it out on this machine."""
    minutes: int = 24 * 60
    """Time limit of a Slurm job."""

    def __call__(self) -> None:
        config = self.chosen(self.config, RunFolder(self.out), resume=self.resume)
        elsewhere = self.engine != "processes" and self.device == "cuda"  # where jobs run there may be a GPU
        rows = sweep(
            config,
            self.out,
            seeds=self.seeds,
            alphas=[alpha_of(config)] if self.alphas is None else self.alphas,
            lrs=[config.internal_rl.lr] if self.lrs is None else self.lrs,
            engine=self.engine,
            workers=self.workers,
            address=self.address,
            minutes=self.minutes,
            resume=self.resume,
            quiet=self.quiet,
            device="cuda" if elsewhere else device_name(self.device),
        )
        Console().print(sweep_table(rows))
        failed = [row["status"] for row in rows if row["status"] != "finished"]
        if failed:
            raise UserError(f"{len(failed)} of {len(rows)} jobs did not finish, such as: {failed[0]}")


@dataclass(kw_only=True)
class Report(OnDevice):
    """One HTML file on runs or reproductions, with figures and a trajectory player; it needs no network."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs or of reproductions."""
    out: Path = Path("report.html")
    """File to write."""

    def __call__(self) -> None:
        if not self.runs:
            raise UserError("no folder was named; give that of a run or of a reproduction.")
        for folder in map(RunFolder, self.runs):
            seeds = read_reproduction(folder).get("seeds", [])
            first = folder.child(f"seed-{seeds[0]}") if seeds else folder
            with telling_unkept(first):
                if artefact_path(first, META_CONTROLLER).exists():
                    show_episodes(load_run(first, device_name(self.device)))
        print(write_report(self.runs, self.out))


COMMANDS = {"reproduce": Reproduce, "figures": Figures, "sweep": Sweep, "report": Report}
