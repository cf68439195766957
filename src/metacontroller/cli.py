"""The command line: metacontroller pretrain | discover | internal-rl | evaluate | probe | steer | inject | gate |
reproduce | figures | sweep | report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal, Union

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, subcommand

from metacontroller.analysis.figures import draw_layers, require_matplotlib
from metacontroller.analysis.report import write_report
from metacontroller.analysis.runs import gate_run, inject_run, probe_run, steer_run
from metacontroller.analysis.study_figures import draw_study
from metacontroller.analysis.summary import results_table, variant_rows
from metacontroller.envs.tasks import parse_task
from metacontroller.errors import UserError
from metacontroller.phases.evaluate import Policy
from metacontroller.phases.parallel import launched, leave, processes
from metacontroller.phases.reproduce import (
    discovery_figures,
    evaluate_run,
    load_run,
    open_folder,
    read_config,
    reproduce,
    run_discover,
    run_internal_rl,
    run_pretrain,
    run_raw_action_rl,
)
from metacontroller.phases.study import STUDIES, StudyConfig, study
from metacontroller.phases.sweep import MEASURES, Engine, sweep
from metacontroller.presets import PRESETS, GridworldConfig, laptop
from metacontroller.presets.gridworld import stream_seed, with_seed
from metacontroller.run_folder import RunFolder

Preset = Literal["debug", "laptop", "quick", "paper"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(kw_only=True)
class Training:
    """Options of all commands that train."""

    resume: bool = False
    """Go on from the last checkpoint."""
    quiet: bool = False
    """Show no progress."""
    device: Device = "auto"
    """auto: a GPU if there is one."""


@dataclass(kw_only=True)
class Pretrain(Training):
    """Phase 1: train an action model on experts' episodes; starts the folder RUN."""

    run: Positional[Path]
    """Folder to make, or with --resume to go on in."""
    preset: Preset | None = None
    """Where the config starts from; laptop unless given."""
    seed: int | None = None
    """From which all randomness derives."""
    config: GridworldConfig = field(default_factory=laptop)
    """Change any value of the preset."""

    def __call__(self) -> None:
        run, device = RunFolder(self.run), device_name(self.device)
        workers = processes(device)
        config = chosen_config(self.config, self.preset, run, self.resume)
        config = config if self.seed is None else with_seed(config, self.seed)
        workers.wait()  # until all have seen what was there before
        if workers.is_main:
            open_folder(run, config, resume=self.resume, option="folder")
        workers.wait()
        started_from = read_config(run).seed
        if started_from != config.seed:
            raise UserError(
                f"{run.path} was started from seed {started_from}, not {config.seed}; leave out --seed to go on with "
                "it, or choose another folder."
            )
        run_pretrain(config, run, resume=self.resume, quiet=self.quiet, device=device)


@dataclass(kw_only=True)
class Discover(Training):
    """Phase 2: find abstract actions inside the frozen action model of RUN."""

    run: Positional[Path]
    """Folder of a pretrained run."""

    def __call__(self) -> None:
        run = RunFolder(self.run)
        config, device = read_config(run), device_name(self.device)
        workers = processes(device)
        run.refuse_begun("discover", resume=self.resume)
        workers.wait()  # until all have seen what was there before
        run_discover(config, run, resume=self.resume, quiet=self.quiet, device=device)


@dataclass(kw_only=True)
class InternalRL(Training):
    """Phase 3: reinforcement learning over the abstract actions of RUN."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions."""
    raw: bool = False
    """The baseline instead: reinforcement learning over raw actions."""

    def __call__(self) -> None:
        run = RunFolder(self.run)
        config, device = read_config(run), device_name(self.device)
        workers = processes(device)
        run.refuse_begun("raw_action_rl" if self.raw else "internal_rl", resume=self.resume)
        workers.wait()  # until all have seen what was there before
        phase = run_raw_action_rl if self.raw else run_internal_rl
        phase(config, run, resume=self.resume, quiet=self.quiet, device=device)


@dataclass(kw_only=True)
class Evaluate:
    """Measure a run, or every seed of a reproduction, on new layouts."""

    run: Positional[Path]
    """Folder of a run or of a reproduction."""
    episodes: int | None = None
    """Episodes to play; as in the run's config unless given."""
    seed: int | None = None
    """Draws the layouts, never those of training; the run's own unless given."""
    task: str | None = None
    """Colors to visit in order, such as 0-1-2-3; the run's post-training task unless given."""
    policy: Policy = "internal-rl"
    """Who acts: raw actions before (base) or after (raw) raw-action RL, codes of the prior or of the trained policy."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        results = [self.measure(RunFolder(path)) for path in seed_folders(self.run)]
        print_results(results, self.run, evaluation_table, as_json=self.json)

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """Success of the chosen policy; where codes act, the gate's figures and what codes mean, too."""
        loaded = load_run(run, device_name(self.device))
        seed = stream_seed(loaded.seed if self.seed is None else self.seed, "evaluate")
        task = None if self.task is None else parse_task(self.task)
        settings = loaded.config.evaluate
        episodes = settings.episodes if self.episodes is None else self.episodes
        result = {"run": run.path.name, **evaluate_run(loaded, self.policy, task=task, episodes=episodes, seed=seed)}
        if self.policy in ("base", "raw"):
            return result
        return {**result, **discovery_figures(loaded, seed, max(episodes, settings.episodes))}


@dataclass(kw_only=True)
class LayerAnalysis:
    """Options of analyses that train something small at every layer of a run's base model."""

    run: Positional[Path]
    """Folder of a run or of a reproduction."""
    steps: int = 1000
    """Updates."""
    batch_size: int = 128
    """Episodes an update."""
    lr: float = 3e-3
    """Learning rate."""
    episodes: int = 2048
    """New episodes to judge by."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""
    quiet: bool = False
    """Show no progress."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        for option in ("steps", "batch_size", "episodes"):
            if getattr(self, option) < 1:
                raise UserError(f"{option} is {getattr(self, option)}; expected at least 1.")
        if self.lr <= 0:
            raise UserError(f"lr is {self.lr}; expected a number above 0.")
        require_matplotlib()
        runs = [RunFolder(path) for path in seed_folders(self.run)]
        options = {name: getattr(self, name) for name in ("steps", "batch_size", "lr", "episodes", "quiet")}
        results = [
            {"run": run.path.name, **self.analysis(run, device=device_name(self.device), **options)} for run in runs
        ]
        draw_layers(RunFolder(self.run), runs)
        print_results(results, self.run, layers_table, as_json=self.json)

    analysis: ClassVar[Callable[..., dict[str, Any]]]


@dataclass(kw_only=True)
class Probe(LayerAnalysis):
    """Linear probes of the subgoal at every layer of the base model (Fig. 3, A1), also of its snapshots; kept in
    probes.safetensors."""

    analysis = staticmethod(probe_run)


@dataclass(kw_only=True)
class Steer(LayerAnalysis):
    """Supervised controllers with true labels at every layer, chained on the post-training task (Fig. 4)."""

    analysis = staticmethod(steer_run)


@dataclass(kw_only=True)
class Inject:
    """Force each subgoal's code in the middle of episodes, and see where they go (Fig. A4)."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions, or of a reproduction."""
    walks: int = 1024
    """For each subgoal, free and forced."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        if self.walks < 1:
            raise UserError(f"walks is {self.walks}; expected at least 1.")
        results = [
            {"run": path.name, **inject_run(RunFolder(path), walks=self.walks, device=device_name(self.device))}
            for path in seed_folders(self.run)
        ]
        print_results(results, self.run, evaluation_table, as_json=self.json)


@dataclass(kw_only=True)
class Gate:
    """The gate against true subgoal changes at tolerances 0, 1, 2, and its histograms (Fig. 6, A3)."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions, or of a reproduction."""
    episodes: int = 2048
    """New episodes to judge by."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        if self.episodes < 1:
            raise UserError(f"episodes is {self.episodes}; expected at least 1.")
        results = [
            {"run": path.name, **gate_run(RunFolder(path), episodes=self.episodes, device=device_name(self.device))}
            for path in seed_folders(self.run)
        ]
        print_results(results, self.run, gate_table, as_json=self.json)


def gate_table(results: Sequence[dict[str, Any]]) -> Table:
    """One line a tolerance and measure, one column a run."""
    table = Table()
    table.add_column("within, steps", justify="right")
    table.add_column("measure")
    for result in results:
        table.add_column(result["run"], justify="right")
    for index, tolerance in enumerate(results[0]["tolerance"]):
        for name in ("recall", "precision", "f1"):
            table.add_row(str(tolerance), name, *(f"{result[name][index]:.3f}" for result in results))
    return table


def print_results(
    results: list[dict[str, Any]], folder: Path, table: Callable[[list[dict[str, Any]]], Table], *, as_json: bool
) -> None:
    """As a table, or as JSON: an object for a run's own folder, a list for a reproduction's."""
    if as_json:
        print(json.dumps(results[0] if seed_folders(folder) == [folder] else results, indent=2))
    else:
        Console().print(table(results))


def layers_table(results: Sequence[dict[str, Any]]) -> Table:
    """One line a layer and measure, one column a run."""
    table = Table()
    table.add_column("measure")
    for result in results:
        table.add_column(result["run"], justify="right")
    for name, value in results[0].items():
        if isinstance(value, list):
            for layer in range(len(value)):
                table.add_row(f"{name}, layer {layer}", *(f"{result[name][layer]:.3f}" for result in results))
        elif isinstance(value, float):
            table.add_row(name, *(f"{result[name]:.3f}" for result in results))
    return table


def seed_folders(path: Path) -> list[Path]:
    """The runs in a reproduction's folder, or the folder of a run itself."""
    return sorted(path.glob("seed-*"), key=lambda part: (len(part.name), part.name)) or [path]


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
    """The paper's figures: the reproduction, every baseline and analysis on its seeds, and a report; goes on where it
    was."""

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


def study_table(found: dict[str, Any]) -> Table:
    """One line a variant, medians over its seeds."""
    table = Table(title=f"{found['seconds'] / 60:.0f} minutes of one core")
    names = {
        "internal_rl_success": "success",
        "gate_recall": "recall",
        "gate_precision": "precision",
        "rate": "rate",
        "distortion": "distortion",
    }
    for title in ("variant", "seeds", *names.values()):
        table.add_column(title, justify="left" if title == "variant" else "right", overflow="fold")
    for name, rows in variant_rows(found).items():
        cells = [[row[measure] for row in rows if row.get(measure) is not None] for measure in names]
        table.add_row(name, str(len(rows)), *(f"{median(values):.3f}" if values else "" for values in cells))
    return table


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


def sweep_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a cell."""
    table = Table()
    short: dict[str, str] = dict(zip(MEASURES, ("success", "recall", "precision", "binary", "bits"), strict=True))
    for name in rows[0]:
        wordy = name == "status"
        table.add_column(
            short.get(name, name), justify="left" if wordy else "right", min_width=8 if wordy else None, overflow="fold"
        )
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


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


COMMANDS: dict[str, type] = {
    "pretrain": Pretrain,
    "discover": Discover,
    "internal-rl": InternalRL,
    "evaluate": Evaluate,
    "probe": Probe,
    "steer": Steer,
    "inject": Inject,
    "gate": Gate,
    "reproduce": Reproduce,
    "figures": Figures,
    "sweep": Sweep,
    "report": Report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 2 after a mistake of the user's, 130 after an interrupt.

    Any other exception is a bug and is let through, with its traceback.
    """
    try:
        command = parse(list(sys.argv[1:] if argv is None else argv))
        if launched() and not isinstance(command, Pretrain | Discover | InternalRL):
            names = "pretrain, discover and internal-rl"
            raise UserError(f"only {names} run in several processes; start this one without a launcher.")
        command()
        leave()
    except UserError as error:
        print(f"metacontroller: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metacontroller: interrupted; add --resume to go on.", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> Any:
    """The command to run. --preset is looked for first: it decides the defaults of all --config options."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", nargs="?")
    preset = early.parse_known_args(argv)[0].preset
    config = PRESETS.get(preset, laptop)()
    defaults = {
        "pretrain": Pretrain(run=tyro.MISSING, config=config),
        "reproduce": Reproduce(config=config),
        "figures": Figures(config=config, study=STUDIES.get(preset or "laptop", StudyConfig())),
        "sweep": Sweep(config=config),
    }
    options: dict[str, Any] = {"config": (FlagCreatePairsOff,)}
    if argv and argv[0] in COMMANDS:
        prog = f"metacontroller {argv[0]}"
        return tyro.cli(COMMANDS[argv[0]], args=argv[1:], prog=prog, default=defaults.get(argv[0]), **options)
    # No command: tyro shows the help asked for, or what is wrong.
    everything = tuple(Annotated[kind, subcommand(name, default=defaults.get(name))] for name, kind in COMMANDS.items())
    return tyro.cli(
        Union[everything],  # type: ignore[arg-type]  # noqa: UP007 - made at run time
        args=argv,
        prog="metacontroller",
        description="Discover abstract actions inside a frozen next-action model and learn over them by reinforcement.",
        **options,
    )


def chosen_config(config: GridworldConfig, preset: str | None, run: RunFolder, resume: bool) -> GridworldConfig:
    """The config asked for; when a run is resumed and nothing was said about it, the run's own."""
    if with_seed(config, config.seed) != config:
        raise UserError("the seeds of phases derive from the run's; change that with --seed or --seeds.")
    untouched = preset is None and config == laptop()
    return read_config(run) if resume and untouched and (run.path / "config.json").exists() else config


def device_name(device: Device) -> str:
    """ "auto" as what is there; UserError for a GPU that is not."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU here; give --device cpu or leave it out.")
    return device


def evaluation_table(results: Sequence[dict[str, Any]]) -> Table:
    """One column a run."""
    table = Table()
    table.add_column("measure")
    for result in results:
        table.add_column(result["run"], justify="right")
    for name in [name for name in results[0] if name != "run"]:
        values = [result[name] for result in results]
        table.add_row(name, *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    return table


if __name__ == "__main__":
    sys.exit(main())
