"""Whole experiments over seeds, and the page about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from metacontroller.analysis.figures import require_matplotlib
from metacontroller.analysis.report import write_report
from metacontroller.analysis.study_figures import draw_study
from metacontroller.analysis.summary import results_table
from metacontroller.commands.options import (
    Device,
    Preset,
    Training,
    chosen_config,
    device_name,
    preset_config,
    seed_folders,
)
from metacontroller.commands.output import study_table, sweep_table
from metacontroller.errors import UserError
from metacontroller.phases.reproduce import open_folder, reproduce
from metacontroller.phases.study import STUDIES, StudyConfig, study
from metacontroller.phases.sweep import Engine, sweep
from metacontroller.presets import GridworldConfig, laptop
from metacontroller.run_folder import RunFolder


@dataclass(kw_only=True)
class Reproduce(Training):
    """Everything: all phases on every seed, the raw-action baseline, measures, figures and a table."""

    out: Path = Path("runs/reproduce")
    """Folder to make, or with --resume to go on in."""
    preset: Preset | None = None
    """Where the config starts from; laptop unless given."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One run for each."""
    workers: int = 1
    """Seeds at the same time."""
    config: GridworldConfig = field(default_factory=laptop)
    """Change any value of the preset."""

    @classmethod
    def at_preset(cls, preset: str | None) -> Reproduce:
        """The defaults of all options."""
        return cls(config=preset_config(preset))

    def __call__(self) -> None:
        config = chosen_config(self.config, self.preset, RunFolder(self.out), self.resume)
        summary = reproduce(
            config,
            self.out,
            self.seeds,
            resume=self.resume,
            workers=self.workers,
            quiet=self.quiet,
            device=device_name(self.device),
        )
        console = Console()
        console.print(results_table(summary))
        console.print(
            f"Summary: {self.out / 'summary.json'}", f"Figures: {self.out / 'figures'}", sep="\n", soft_wrap=True
        )


@dataclass(kw_only=True)
class Figures:
    """The paper's figures: the reproduction, every baseline and analysis on its seeds, and a report.

    What is finished is not run again.
    """

    out: Path = Path("runs/reproduce")
    """Folder to make, or of a reproduction to go on in."""
    preset: Preset | None = None
    """Where the configs start from; laptop unless given."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One run for each."""
    workers: int = 2
    """Runs at the same time, one thread each."""
    quiet: bool = False
    """Show no progress."""
    device: Device = "auto"
    """auto: a GPU if there is one."""
    study: StudyConfig = field(default_factory=StudyConfig)
    """How much of every baseline and analysis."""
    config: GridworldConfig = field(default_factory=laptop)
    """Change any value of the preset."""

    @classmethod
    def at_preset(cls, preset: str | None) -> Figures:
        """The defaults of all options."""
        return cls(config=preset_config(preset), study=STUDIES.get(preset or "laptop", StudyConfig()))

    def __call__(self) -> None:
        require_matplotlib()
        folder, device = RunFolder(self.out), device_name(self.device)
        config = chosen_config(self.config, self.preset, folder, True)
        open_folder(folder, config, resume=True, option="--out")
        found = study(self.study, self.out, self.seeds, workers=self.workers, quiet=self.quiet, device=device)
        failed = [row for row in found["cells"] if row["status"] != "finished"]
        if not any(row["name"] == "run" for row in failed):
            reproduce(config, self.out, self.seeds, resume=True, quiet=True, device=device)
            draw_study(folder, [RunFolder(path) for path in seed_folders(self.out)])
            print(write_report([self.out], self.out / "report.html", device=device))
        Console().print(study_table(found))
        if failed:
            row = failed[0]
            raise UserError(
                f"{len(failed)} of {len(found['cells'])} parts did not finish, such as {row['name']} of seed "
                f"{row['seed']}: {row['status']}"
            )


@dataclass(kw_only=True)
class Sweep(Training):
    """Seeds x alpha x learning rate of internal RL; what is finished is not run again, what fails is reported."""

    out: Path = Path("runs/sweep")
    """Folder to make, or with --resume to go on in."""
    preset: Preset | None = None
    """Where the config starts from; laptop unless given."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One base model for each."""
    alphas: list[float] | None = None
    """Weights of the KL, a metacontroller for each; the preset's unless given."""
    lrs: list[float] | None = None
    """Learning rates of internal RL; the preset's unless given."""
    engine: Engine = "processes"
    """On this machine, by submitit on Slurm, or on a Ray cluster; all need one folder that every machine can reach."""
    workers: int = 1
    """Cells at the same time; on Ray the cluster decides."""
    address: str | None = None
    """Of the Ray cluster; for Slurm, "local" tries it out on this machine."""
    minutes: int = 24 * 60
    """Time limit of a Slurm job."""
    config: GridworldConfig = field(default_factory=laptop)
    """Change any value of the preset."""

    @classmethod
    def at_preset(cls, preset: str | None) -> Sweep:
        """The defaults of all options."""
        return cls(config=preset_config(preset))

    def __call__(self) -> None:
        config = chosen_config(self.config, self.preset, RunFolder(self.out), self.resume)
        rows = sweep(
            config,
            self.out,
            seeds=self.seeds,
            alphas=[config.discover.alpha] if self.alphas is None else self.alphas,
            lrs=[config.internal_rl.lr] if self.lrs is None else self.lrs,
            engine=self.engine,
            workers=self.workers,
            address=self.address,
            minutes=self.minutes,
            resume=self.resume,
            quiet=self.quiet,
            device=device_name(self.device),
        )
        Console().print(sweep_table(rows))
        failed = [row["status"] for row in rows if row["status"] != "finished"]
        if failed:
            raise UserError(f"{len(failed)} of {len(rows)} cells did not finish, such as: {failed[0]}")


@dataclass(kw_only=True)
class Report:
    """One HTML file on finished reproductions, with all figures and a trajectory player; it needs no network."""

    runs: Positional[tuple[Path, ...]]
    """Folders of reproductions."""
    out: Path = Path("report.html")
    """File to write."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        if not self.runs:
            raise UserError("no folder was named; give that of a reproduction.")
        print(write_report(self.runs, self.out, device=device_name(self.device)))
