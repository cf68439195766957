"""One experiment many times: seeds x alpha x learning rate of internal RL. What is shared is made once.

    OUT/config.json, summary.json        what the sweep varies, and its table
    OUT/seed-0/                          a base model
    OUT/seed-0/alpha-0.004/              a metacontroller on it
    OUT/seed-0/alpha-0.004/lr-0.001/     internal RL with it

Every folder is a run. Its job, see `schedule`, runs in this process, in processes, on Slurm or on a Ray cluster: always
the same function on one folder that all can reach.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metacontroller.arguments import checked_kinds
from metacontroller.phases.artefacts import BASE_MODEL, COTRAINED_MODEL, META_CONTROLLER, SEGMENTATION, copy_artefact
from metacontroller.ranges import Count, NotNegative, Positive, Processes
from metacontroller.recipes.config import (
    ExperimentConfig,
    load_run,
    open_folder,
    read_config,
    to_json,
    with_seed,
    with_values,
)
from metacontroller.recipes.jobs import Engine
from metacontroller.recipes.measure import discovery_figures
from metacontroller.recipes.run_phase import RUN_PHASE
from metacontroller.recipes.schedule import FolderJob, RunSeed, check_distinct, number_name, run_all
from metacontroller.report.tables import MEASURES
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import stream_seed


@dataclass(frozen=True)
class SweepJob(FolderJob):
    """One run: without alpha it makes the base model of its seed, without lr a metacontroller on that."""

    seed: int
    alpha: float | None = None
    lr: float | None = None

    @property
    def folder(self) -> str:
        names = [f"seed-{self.seed}"]
        names += [] if self.alpha is None else [f"alpha-{number_name(self.alpha)}"]
        names += [] if self.lr is None else [f"lr-{number_name(self.lr)}"]
        return "/".join(names)

    @property
    def parent(self) -> SweepJob | None:
        if self.alpha is None:
            return None
        return SweepJob(self.seed) if self.lr is None else SweepJob(self.seed, self.alpha)

    def work(self, out: Path, device: str) -> None:
        """One phase in the job's folder, and its summary."""
        if self.finished(out):
            return
        run, config = self.run(out), job_config(read_config(RunFolder(out)), self)
        with run.locked():
            run.write_config(to_json(config))
            if self.parent:
                for artefact in (BASE_MODEL, COTRAINED_MODEL, META_CONTROLLER, SEGMENTATION):
                    copy_artefact(artefact, self.parent.run(out).path, run.path)
            phase = "pretrain" if self.alpha is None else "discover" if self.lr is None else "internal_rl"
            RUN_PHASE[phase](config, run, resume=True, quiet=True, device=device)
            run.write_summary({**vars(self), **_measure(phase, config, run, device)})


def job_config(config: ExperimentConfig, job: SweepJob) -> ExperimentConfig:
    """The sweep's config with the job's values; without a linear warm-up, alpha starts as it ends.

    CompILE's two weights, of its codes and of its boundaries, are both alpha.
    """
    changes: dict[str, Any] = {} if job.lr is None else {"internal_rl.lr": job.lr}
    if job.alpha is not None:
        names = ["discover.alpha"]
        if config.discovery == "compile":
            names = ["compile.alpha_code", "compile.alpha_boundary"]
        elif config.discover.alpha_start == config.discover.alpha:
            names.append("discover.alpha_start")
        changes |= dict.fromkeys(names, job.alpha)
    return with_values(with_seed(config, job.seed), changes)


def alpha_of(config: ExperimentConfig) -> float:
    """The weight of the KL that a config has without a sweep."""
    return config.compile.alpha_code if config.discovery == "compile" else config.discover.alpha


def _measure(phase: str, config: ExperimentConfig, run: RunFolder, device: str) -> dict[str, Any]:
    """What a phase is judged by, in held-out episodes."""
    loaded, episodes = load_run(run, device, config), config.evaluate.episodes
    seed = stream_seed(config.seed, "evaluate")
    if phase == "discover":
        return discovery_figures(loaded, seed, episodes)
    if phase == "internal_rl":
        return {"internal_rl_success": loaded.evaluate("internal-rl", episodes=episodes, seed=seed)["success"]}
    return {}


@checked_kinds
def sweep(
    config: ExperimentConfig,
    out: str | os.PathLike[str],
    *,
    seeds: Sequence[RunSeed],
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
    check_distinct(seeds=seeds, alphas=alphas, lrs=lrs)
    folder = RunFolder(out)
    combinations = [SweepJob(seed, alpha, lr) for seed in seeds for alpha in alphas for lr in lrs]
    jobs = [SweepJob(seed) for seed in seeds]
    jobs += [SweepJob(seed, alpha) for seed in seeds for alpha in alphas]
    options: dict[str, Any] = {"engine": engine, "workers": workers, "address": address, "minutes": minutes}
    with folder.locked():
        open_folder(folder, config, "sweep", resume=resume, option="--out")
        options |= {"logs": folder.within("slurm"), "device": device}
        run_all(folder.path, [*jobs, *combinations], (device,), title="sweep", quiet=quiet, **options)
        rows = [_row(folder.path, job) for job in combinations]
        folder.write_summary({"jobs": rows})
    return rows


def _row(out: Path, job: SweepJob) -> dict[str, Any]:
    """The job's line of the table, with what its metacontroller was judged by."""
    assert job.parent is not None
    results = {**job.parent.run(out).read_summary(), **job.run(out).read_summary()}
    return {**vars(job), "status": job.status(out), **{name: results.get(name) for name in MEASURES}}
