"""Every baseline and every analysis on the seeds of a reproduction: what the paper's figures are drawn from.

    OUT/seed-0/ ...                  the reproduction, with the analyses of its runs
    OUT/study/NAME/seed-0/           a run folder of each variant: config, artefacts, metrics, summary
    OUT/study/config.json            what the study was asked for
    OUT/study/summary.json           all numbers

A variant starts from the base model of the reproduction's seed, changes what its name says and nothing else, and is
measured like it. Whatever is finished is not run again, what was interrupted is resumed from its last checkpoint, what
failed leaves ``error.txt``, and the rest run all the same.
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
from metacontroller.ranges import PROCESSES, Whole, check_number
from metacontroller.recipes.config import (
    ExperimentConfig,
    load_run,
    read_config,
    refuse_other_recipe,
    to_json,
    with_seed,
)
from metacontroller.recipes.jobs import Job, failure_read, failure_written, run_jobs, write_failure
from metacontroller.recipes.measure import measure_variant
from metacontroller.recipes.reproduce import reproduce_seed, show_episodes
from metacontroller.recipes.run_phase import run_phase
from metacontroller.recipes.variants import StudyConfig, Variant, variants
from metacontroller.storage.config_file import from_plain
from metacontroller.storage.files import inside
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.progress import track
from metacontroller.training.seeding import MAX_SEED

FOLDER = "study"


# -- one job ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyJob:
    """A seed of the reproduction (what: "run"), its analyses ("analyses"), or of the variant named.

    analyses: the names of those that there are to do.
    """

    what: str
    seed: int
    analyses: tuple[str, ...] = ()

    def folder(self, out: Path) -> Path:
        """Where it leaves its files; UserError where a link leads out."""
        reproduced = self.what in ("run", "analyses")
        return inside(out, out / f"seed-{self.seed}") if reproduced else variant_folder(out, self.what, self.seed)

    def finished(self, out: Path) -> bool:
        """Whether nothing of it is left to do."""
        run = RunFolder(self.folder(out))
        if self.what == "analyses":
            return all(run.read_analysis(name) for name in self.analyses)
        return bool(run.read_summary())


def variant_folder(out: Path, name: str, seed: int) -> Path:
    """The run folder of a variant's seed."""
    return inside(out, out / FOLDER / name / f"seed-{seed}")


def attempt(out: str, job: StudyJob, study: StudyConfig, device: str) -> None:
    """Runs a job, or resumes it; what went wrong is written to its ``error.txt``."""
    folder = job.folder(Path(out))
    with failure_written(folder):
        if job.what == "run":
            config = with_seed(read_config(RunFolder(out)), job.seed)
            reproduce_seed(config, folder, quiet=True, device=device)
        elif job.what == "analyses":
            analyse(RunFolder(folder), job.analyses, study, device)
        else:
            run_variant(Path(out), job, study, device)


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
    fields = {field.name: f"{analysis.command}_{field.name}" for field in dataclasses.fields(analysis.Config)}
    return analysis.Config(**{field: getattr(study, own) for field, own in fields.items() if hasattr(study, own)})


def run_variant(out: Path, job: StudyJob, study: StudyConfig, device: str) -> None:
    """Its phases, resumed if they were begun, and its summary."""
    variant = variants(read_config(RunFolder(out)), study)[job.what]
    config, run = with_seed(variant.config, job.seed), RunFolder(job.folder(out))
    with run.locked():
        _run_phases(out, job, variant, config, run, device)


def _run_phases(
    out: Path, job: StudyJob, variant: Variant, config: ExperimentConfig, run: RunFolder, device: str
) -> None:
    source = RunFolder(out / f"seed-{job.seed}")
    phases = ["discover"]
    run.write_config(to_json(config))
    if variant.start == "base":
        copy_artefact(BASE_MODEL, source.path, run.path)
    elif variant.start == "own":
        phases.insert(0, "pretrain")
    elif variant.start != "new":
        snapshot = snapshot_path(source, variant.start)
        copy_artefact(snapshot.stem, snapshot.parent, run.path, BASE_MODEL)
    if variant.reinforces:
        phases.append("internal_rl")
    for phase in phases:
        run_phase(phase, config, run.path, True, device)
    began = time.monotonic()
    measured = measure_variant(load_run(run, device, config), reinforced=variant.reinforces)
    phase_seconds = {phase: run.load_checkpoint(phase)[1]["seconds"] for phase in phases}
    phase_seconds["evaluate"] = time.monotonic() - began
    seconds = sum(phase_seconds.values())
    run.write_summary({"seed": job.seed, **measured, "seconds": seconds, "phase_seconds": phase_seconds})


# -- all jobs ---------------------------------------------------------------------------------------------------------


@checked_kinds
def study(
    config: StudyConfig,
    out: str | os.PathLike[str],
    seeds: Sequence[int],
    *,
    workers: int = 1,
    quiet: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Runs what is left of the study in ``out``, which holds a reproduction's config; writes and returns its summary.

    workers: jobs at the same time, each in a process of its own with one thread; with one worker in this process.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds are {list(seeds)}; give at least one, each once.")
    check_number("workers", workers, PROCESSES)
    for seed in seeds:
        check_number("seed", seed, Whole(0, MAX_SEED))
    folder, own = RunFolder(out), RunFolder(out).child(FOLDER)
    refuse_other_recipe(folder, "figures")
    with folder.locked():
        return _run_all(config, folder, own, seeds, workers, quiet, device)


def _run_all(
    config: StudyConfig, folder: RunFolder, own: RunFolder, seeds: Sequence[int], workers: int, quiet: bool, device: str
) -> dict[str, Any]:
    if (own.path / "config.json").exists() and from_plain(StudyConfig, own.read_config()) != config:
        raise UserError(f"{own.path} was started with other settings; ask for the same, or move that folder away.")
    own.write_config(config)
    experiment = read_config(folder)
    named = variants(experiment, config)
    jobs = _jobs(named, seeds, config.few_seeds, possible_analyses(experiment))
    left = [job for job in jobs if not job.finished(folder.path)]
    done = len(jobs) - len(left)

    with track(len(jobs), "study", start=done, quiet=quiet) as progress:

        def next_job() -> Job | None:
            for job in left:
                if job.what == "run" or StudyJob("run", job.seed).finished(folder.path):
                    left.remove(job)
                    return str(folder.path), job, config, device
            return None

        def advance() -> None:
            nonlocal done
            done += 1
            own.write_summary(_summary(folder.path, jobs, named))  # so that a report can be made on the way
            progress.update(done)

        failed = run_jobs(attempt, next_job, advance, workers=workers)
    for (_, job, _, _), error in failed:  # those that could not write of it themselves
        write_failure(job.folder(folder.path), error)
    summary = _summary(folder.path, jobs, named)
    own.write_summary(summary)
    return summary


def _jobs(named: dict[str, Variant], seeds: Sequence[int], few: int, possible: tuple[str, ...]) -> list[StudyJob]:
    """In the order in which they are run: what every seed has comes first."""
    baselines = [variant.name for variant in named.values() if variant.group == "baseline"]
    rest = [variant.name for variant in named.values() if variant.group != "baseline"]
    jobs = [StudyJob(what, seed) for what in ("run", *baselines) for seed in seeds]
    jobs += [StudyJob("analyses", seed, possible) for seed in seeds]
    return jobs + [StudyJob(what, seed) for what in rest for seed in seeds[:few]]


def _summary(out: Path, jobs: list[StudyJob], named: dict[str, Variant]) -> dict[str, Any]:
    """jobs: a row each with what was measured, or why not; seconds: of all jobs, added up."""
    rows, seconds = [], 0.0
    for job in jobs:
        run = RunFolder(job.folder(out))
        if job.what == "analyses":
            seconds += sum(run.read_analysis(name).get("seconds", 0.0) for name in job.analyses)
            results: dict[str, Any] = {}
        else:
            results = run.read_summary()
            seconds += results.get("seconds", 0.0)
        row: dict[str, Any] = {"name": job.what, "seed": job.seed, "status": _status(out, job)}
        if job.what in named:
            kept = ("internal_rl_success", "rate", "distortion", "aligned", "seconds")
            kept += ("gate_recall", "gate_precision", "gate_binary_fraction", "segment_recall", "segment_precision")
            row |= {"group": named[job.what].group, "value": named[job.what].value}
            row |= {name: results[name] for name in kept if name in results}
        rows.append(row)
    return {"jobs": rows, "seconds": seconds}


def _status(out: Path, job: StudyJob) -> str:
    if job.finished(out):
        return "finished"
    failure = failure_read(job.folder(out))
    return "not run" if failure is None else f"failed: {failure}"
