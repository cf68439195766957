"""Every baseline and every analysis on the seeds of a reproduction: what the paper's figures are drawn from.

    OUT/seed-0/ ...                  the reproduction, with the analyses of its runs
    OUT/study/NAME/seed-0/           a run folder of each of `study_runs`: config, artefacts, metrics, summary
    OUT/study/config.json            what the study was asked for
    OUT/study/summary.json           all numbers

A run of the study starts from the base model of the reproduction's seed, changes what its name says and nothing else,
and is measured like it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metacontroller.analysis.registry import analyses, run_analysis
from metacontroller.arguments import checked_kinds
from metacontroller.domains.registry import domain_of
from metacontroller.errors import UserError
from metacontroller.phases.artefacts import BASE_MODEL, copy_artefact
from metacontroller.phases.pretrain import snapshot_path
from metacontroller.ranges import Processes
from metacontroller.recipes.config import (
    ExperimentConfig,
    load_run,
    read_config,
    refuse_other_recipe,
    to_json,
    with_seed,
)
from metacontroller.recipes.measure import measure_discovery
from metacontroller.recipes.reproduce import reproduce_seed, show_episodes
from metacontroller.recipes.run_phase import run_phase
from metacontroller.recipes.schedule import FolderJob, RunSeed, check_distinct, run_all
from metacontroller.recipes.study_runs import StudyConfig, StudyRun, study_runs
from metacontroller.storage.config_file import from_plain
from metacontroller.storage.run_folder import RunFolder

MEASURED = ("internal_rl_success", "rate", "distortion", "aligned", "seconds", "gate_recall", "gate_precision")
MEASURED += ("gate_binary_fraction", "segment_recall", "segment_precision")
"""What the study's summary repeats of the summaries of its runs."""


@dataclass(frozen=True)
class StudyJob(FolderJob):
    """A seed of the reproduction (what: "run"), its analyses ("analyses"), or of the run of the study that is named.

    analyses: the names of those that there are to do.
    """

    what: str
    seed: int
    analyses: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return f"seed-{self.seed}" if self.what in ("run", "analyses") else f"study/{self.what}/seed-{self.seed}"

    @property
    def parent(self) -> StudyJob | None:
        return None if self.what == "run" else StudyJob("run", self.seed)

    def finished(self, out: Path) -> bool:
        if self.what == "analyses":
            return all(self.run(out).read_analysis(name) for name in self.analyses)
        return super().finished(out)

    def work(self, out: Path, study: StudyConfig, device: str) -> None:
        run, config = self.run(out), read_config(RunFolder(out))
        if self.what == "run":
            reproduce_seed(with_seed(config, self.seed), run.path, quiet=True, device=device)
        elif self.what == "analyses":
            analyse(run, self.analyses, study, device)
        else:
            with run.locked():
                _run_phases(study_runs(config, study)[self.what], self.seed, RunFolder(out), run, device)


def possible_analyses(config: ExperimentConfig) -> tuple[str, ...]:
    """The names of all analyses that a world allows: some need labels of its subgoals."""
    labelled = bool(domain_of(config.domain).spec().subgoals)
    return tuple(name for name, analysis in analyses().items() if labelled or not analysis.needs_labels)


def analyse(run: RunFolder, names: Sequence[str], study: StudyConfig, device: str) -> None:
    """Those of the analyses named that a reproduced run does not have yet."""
    loaded = load_run(run, device)
    for name in names:
        if not run.read_analysis(name):
            began = time.monotonic()
            results = run_analysis(name, loaded, analysis_config(name, study), quiet=True)
            run.write_analysis(name, {**results, "seconds": time.monotonic() - began})
    show_episodes(loaded, quiet=True)  # with what the probes say of them


def analysis_config(name: str, study: StudyConfig) -> Any:
    """The config of an analysis with what the study says of it.

    The study's ``probe_steps`` is the field ``steps`` of the analysis whose command is ``probe``.
    """
    analysis = analyses()[name]
    options = {field.name: f"{analysis.command}_{field.name}" for field in dataclasses.fields(analysis.Config)}
    return analysis.Config(
        **{name: getattr(study, option) for name, option in options.items() if hasattr(study, option)}
    )


def _run_phases(chosen: StudyRun, seed: int, out: RunFolder, run: RunFolder, device: str) -> None:
    """The phases of a run of the study, resumed if they were begun, and its summary."""
    source, config = out.child(f"seed-{seed}"), with_seed(chosen.config, seed)
    phases = ["discover"]
    run.write_config(to_json(config))
    if chosen.start == "base":
        copy_artefact(BASE_MODEL, source.path, run.path)
    elif chosen.start == "pretrain":
        phases.insert(0, "pretrain")
    elif chosen.start != "new":
        snapshot = snapshot_path(source, chosen.start)
        copy_artefact(snapshot.stem, snapshot.parent, run.path, BASE_MODEL)
    if chosen.reinforces:
        phases.append("internal_rl")
    for phase in phases:
        run_phase(phase, config, run.path, True, device)
    began = time.monotonic()
    measured = measure_discovery(load_run(run, device, config), reinforced=chosen.reinforces)
    phase_seconds = {phase: run.load_checkpoint(phase)[1]["seconds"] for phase in phases}
    phase_seconds["evaluate"] = time.monotonic() - began
    seconds = sum(phase_seconds.values())
    run.write_summary({"seed": seed, **measured, "seconds": seconds, "phase_seconds": phase_seconds})


@checked_kinds
def study(
    config: StudyConfig,
    out: str | os.PathLike[str],
    seeds: Sequence[RunSeed],
    *,
    workers: Processes = 1,
    quiet: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Runs what is left of the study in ``out``, which holds a reproduction's config; writes and returns its summary.

    workers: jobs at the same time, each in a process of its own with one thread; with one worker in this process.
    """
    check_distinct(seeds=seeds)
    folder, results = RunFolder(out), RunFolder(out).child("study")
    refuse_other_recipe(folder, "figures")
    with folder.locked():
        if (results.path / "config.json").exists() and from_plain(StudyConfig, results.read_config()) != config:
            raise UserError(
                f"{results.path} was started with other settings; ask for the same, or move that folder away."
            )
        results.write_config(config)
        experiment = read_config(folder)
        runs = study_runs(experiment, config)
        jobs = _jobs(runs, seeds, config.few_seeds, possible_analyses(experiment))

        def write_summary() -> None:  # after each, so that a report can be made on the way
            results.write_summary(_summary(folder.path, jobs, runs))

        options: dict[str, Any] = {"title": "study", "quiet": quiet, "workers": workers}
        run_all(folder.path, jobs, (config, device), after_each=write_summary, **options)
        write_summary()
    return results.read_summary()


def _jobs(runs: dict[str, StudyRun], seeds: Sequence[int], few: int, possible: tuple[str, ...]) -> list[StudyJob]:
    """In the order in which they are run: what every seed has comes first."""
    baselines = [name for name, chosen in runs.items() if chosen.group == "baseline"]
    jobs = [StudyJob(what, seed) for what in ("run", *baselines) for seed in seeds]
    jobs += [StudyJob("analyses", seed, possible) for seed in seeds]
    return jobs + [StudyJob(what, seed) for what in runs if what not in baselines for seed in seeds[:few]]


def _summary(out: Path, jobs: list[StudyJob], runs: dict[str, StudyRun]) -> dict[str, Any]:
    """jobs: a row each with what was measured, or why not; seconds: of all jobs, added up."""
    rows, seconds = [], 0.0
    for job in jobs:
        run, row = job.run(out), {"name": job.what, "seed": job.seed, "status": job.status(out)}
        if job.what == "analyses":
            seconds += sum(run.read_analysis(name).get("seconds", 0.0) for name in job.analyses)
        else:
            results = run.read_summary()
            seconds += results.get("seconds", 0.0)
            if job.what in runs:
                row |= {"group": runs[job.what].group, "value": runs[job.what].value}
                row |= {name: results[name] for name in MEASURED if name in results}
        rows.append(row)
    return {"jobs": rows, "seconds": seconds}
