"""One experiment many times: seeds x alpha x learning rate of internal RL. What is shared is made once.

    OUT/config.json, summary.json        what the sweep varies, and its table
    OUT/seed-0/                          a base model
    OUT/seed-0/alpha-0.004/              a metacontroller on it
    OUT/seed-0/alpha-0.004/lr-0.001/     internal RL with it

Every folder is a run and its job is finished when it has a summary; a finished job is not run again, one that was
interrupted is resumed from its last checkpoint, one that failed leaves ``error.txt``, and the others run all the same.
Jobs run in this process, in processes, on Slurm or on a Ray cluster: always the same function, `attempt`, on one folder
that all can reach.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.phases.artefacts import BASE_MODEL, COTRAINED_MODEL, META_CONTROLLER, SEGMENTATION, copy_artefact
from metacontroller.ranges import Count, NotNegative, Positive, Processes
from metacontroller.recipes.config import (
    ExperimentConfig,
    load_run,
    number_name,
    open_folder,
    read_config,
    to_json,
    with_seed,
)
from metacontroller.recipes.jobs import Engine, Job, failure_read, failure_written, run_jobs, write_failure
from metacontroller.recipes.measure import discovery_figures
from metacontroller.recipes.run_phase import RUN_PHASE
from metacontroller.report.tables import MEASURES
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.progress import track
from metacontroller.training.seeding import stream_seed


@dataclass(frozen=True)
class SweepJob:
    """One run: without alpha it makes the base model of its seed, without lr a metacontroller on that."""

    seed: int
    alpha: float | None = None
    lr: float | None = None

    @property
    def folder(self) -> str:
        """Where it is, below the sweep's folder."""
        names = [f"seed-{self.seed}"]
        names += [] if self.alpha is None else [f"alpha-{number_name(self.alpha)}"]
        names += [] if self.lr is None else [f"lr-{number_name(self.lr)}"]
        return "/".join(names)

    @property
    def parent(self) -> SweepJob | None:
        """The job whose artefacts it starts from."""
        if self.alpha is None:
            return None
        return SweepJob(self.seed) if self.lr is None else SweepJob(self.seed, self.alpha)

    def run(self, out: Path) -> RunFolder:
        """Its run, in the sweep's folder; UserError where a link leads out of that."""
        return RunFolder(out).child(self.folder)

    def finished(self, out: Path) -> bool:
        """Whether nothing of it is left to do."""
        return bool(self.run(out).read_summary())


def job_config(config: ExperimentConfig, job: SweepJob) -> ExperimentConfig:
    """The sweep's config with the job's values; without a linear warm-up, alpha starts as it ends.

    CompILE's two weights, of its codes and of its boundaries, are both alpha.
    """
    config = with_seed(config, job.seed)
    if job.alpha is not None and config.discovery == "compile":
        weights = replace(config.compile, alpha_code=job.alpha, alpha_boundary=job.alpha)
        config = replace(config, compile=weights)
    elif job.alpha is not None:
        warms_up = config.discover.alpha_start != config.discover.alpha
        start = config.discover.alpha_start if warms_up else job.alpha
        config = replace(config, discover=replace(config.discover, alpha=job.alpha, alpha_start=start))
    if job.lr is not None:
        config = replace(config, internal_rl=replace(config.internal_rl, lr=job.lr))
    return config


def own_alpha(config: ExperimentConfig) -> float:
    """The weight of the KL that a config has without a sweep."""
    return config.compile.alpha_code if config.discovery == "compile" else config.discover.alpha


# -- one job ----------------------------------------------------------------------------------------------------------


def attempt(out: str, job: SweepJob, device: str) -> None:
    """Runs a job, or resumes it; what went wrong is written to its ``error.txt``."""
    with failure_written(job.run(Path(out)).path):
        run_job(Path(out), job, device)


def run_job(out: Path, job: SweepJob, device: str) -> None:
    """One phase in the job's folder, and its summary."""
    if job.finished(out):
        return
    run, config = job.run(out), job_config(read_config(RunFolder(out)), job)
    with run.locked():
        run.write_config(to_json(config))
        if job.parent:
            for artefact in (BASE_MODEL, COTRAINED_MODEL, META_CONTROLLER, SEGMENTATION):
                copy_artefact(artefact, job.parent.run(out).path, run.path)
        phase = "pretrain" if job.alpha is None else "discover" if job.lr is None else "internal_rl"
        RUN_PHASE[phase](config, run, resume=True, quiet=True, device=device)
        run.write_summary({**vars(job), **_measure(config, run, job, device)})


def _measure(config: ExperimentConfig, run: RunFolder, job: SweepJob, device: str) -> dict[str, Any]:
    """What the job's phase is judged by, in held-out episodes."""
    if job.alpha is None:
        return {}
    loaded = load_run(run, device, config)
    episodes, seed = config.evaluate.episodes, stream_seed(config.seed, "evaluate")
    if job.lr is None:
        return discovery_figures(loaded, seed, episodes)
    return {"internal_rl_success": loaded.evaluate("internal-rl", episodes=episodes, seed=seed)["success"]}


# -- all jobs ---------------------------------------------------------------------------------------------------------


@checked_kinds
def sweep(
    config: ExperimentConfig,
    out: str | os.PathLike[str],
    *,
    seeds: Sequence[int],
    alphas: Sequence[NotNegative],
    lrs: Sequence[Positive],
    engine: Engine = "processes",
    workers: Processes = 1,
    address: str | None = None,
    minutes: Count = 24 * 60,
    resume: bool = False,
    quiet: bool = False,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Runs all jobs; writes ``out/summary.json`` and returns its rows, one a combination, in their order.

    engine, workers, address, minutes: see `run_jobs`. A row holds seed, alpha, lr, status ("finished" or why not) and
    `MEASURES`; nothing in it depends on interruptions.
    """
    for name, values in (("seeds", seeds), ("alphas", alphas), ("lrs", lrs)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name} are {list(values)}; give at least one, each once.")
    folder = RunFolder(out)
    with folder.locked():
        open_folder(folder, config, "sweep", resume=resume, option="--out")
        options: dict[str, Any] = {"engine": engine, "workers": workers, "address": address, "minutes": minutes}
        return _run_all(folder, seeds, alphas, lrs, quiet, device, options)


def _run_all(
    folder: RunFolder,
    seeds: Sequence[int],
    alphas: Sequence[float],
    lrs: Sequence[float],
    quiet: bool,
    device: str,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """options: of `run_jobs`."""
    combinations = [SweepJob(seed, alpha, lr) for seed in seeds for alpha in alphas for lr in lrs]
    jobs = [SweepJob(seed) for seed in seeds]
    jobs += [SweepJob(seed, alpha) for seed in seeds for alpha in alphas]
    jobs += combinations
    left = [job for job in jobs if not job.finished(folder.path)]
    done = len(jobs) - len(left)

    with track(len(jobs), "sweep", start=done, quiet=quiet) as progress:

        def next_job() -> Job | None:
            for job in left:
                if job.parent is None or job.parent.finished(folder.path):
                    left.remove(job)
                    return str(folder.path), job, device
            return None

        def advance() -> None:
            nonlocal done
            done += 1
            progress.update(done)

        failed = run_jobs(attempt, next_job, advance, logs=folder.within("slurm"), device=device, **options)
    for (_, job, _), error in failed:  # those that could not write of it themselves
        write_failure(job.run(folder.path).path, error)
    rows = [_row(folder.path, job) for job in combinations]
    folder.write_summary({"jobs": rows})
    return rows


def _row(out: Path, job: SweepJob) -> dict[str, Any]:
    """The job's line of the table, with what its metacontroller was judged by."""
    assert job.parent is not None
    results = {**job.parent.run(out).read_summary(), **job.run(out).read_summary()}
    return {**vars(job), "status": _status(out, job), **{name: results.get(name) for name in MEASURES}}


def _status(out: Path, job: SweepJob) -> str:
    if job.finished(out):
        return "finished"
    if job.parent is not None and not job.parent.finished(out):
        return f"not run: {_status(out, job.parent)}"
    failure = failure_read(job.run(out).path)
    if failure is not None:
        return f"failed in {job.folder}: {failure}"
    return f"failed in {job.folder}: it left no summary"
