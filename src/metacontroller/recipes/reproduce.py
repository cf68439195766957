"""The whole experiment, seed by seed: pretrain, discover, internal RL beside raw-action RL, measure, draw.

    OUT/config.json, summary.json, figures/    of all seeds
    OUT/seed-0/ ...                            a run folder each: all phases' artefacts, metrics, summary, figures

Each phase is resumed from its last checkpoint, which also says how long the work that it holds has taken.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import run_analysis
from metacontroller.analysis.video import can_film, write_video
from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.ranges import Processes
from metacontroller.recipes.config import ExperimentConfig, load_run, open_folder, with_seed
from metacontroller.recipes.jobs import in_processes, usable_cores
from metacontroller.recipes.machine import environment_facts
from metacontroller.recipes.measure import measure
from metacontroller.recipes.run_phase import PHASES, RL_PHASES, run_phase
from metacontroller.recipes.schedule import RunSeed, check_distinct
from metacontroller.report import figures
from metacontroller.report.results import read_episodes
from metacontroller.report.tables import RESULTS
from metacontroller.storage.run_folder import RunFolder, peak_rss_mb
from metacontroller.training.progress import announce, label_lines
from metacontroller.training.seeding import stream_seed
from metacontroller.training.tracking import Tracker

# -- one seed ---------------------------------------------------------------------------------------------------------


def reproduce_seed(
    config: ExperimentConfig,
    folder: Path,
    *,
    quiet: bool = False,
    apart: bool = False,
    device: str = "cpu",
    track: Tracker | None = None,
) -> dict[str, Any]:
    """All phases of one seed, from wherever the folder stands; returns its summary, which is written last.

    apart: each phase in a process of its own, whose memory is free again when it ends; the two kinds of RL side by
    side with one thread each, all else with all threads.
    """
    run, threads = RunFolder(folder), torch.get_num_threads()
    if finished := run.read_summary():
        return finished
    jobs: dict[str, Any] = {phase: (phase, config, folder, quiet, device, track) for phase in PHASES}
    with run.locked():
        if apart:
            for phase in ("pretrain", "discover"):
                in_processes(run_phase, [jobs[phase]], threads=threads)
            in_processes(run_phase, [jobs[phase] for phase in RL_PHASES], at_once=len(RL_PHASES))
            in_processes(conclude, [(config, folder, quiet, device, peak_rss_mb())], threads=threads)
        else:
            for job in jobs.values():
                run_phase(*job)
            conclude(config, folder, quiet, device)
    return run.read_summary()


def conclude(
    config: ExperimentConfig, folder: Path, quiet: bool, device: str, parent_peak_mb: float | None = None
) -> None:
    """Measures a seed that has been through all phases, draws it and writes its summary.

    parent_peak_mb: the memory of the process that waits for this one, if each phase had a process of its own.
    """
    began = time.monotonic()
    run = RunFolder(folder)
    loaded = load_run(run, device, config)
    measured = measure(loaded, quiet)
    announce("figures of the run", quiet)
    show_episodes(loaded, quiet=quiet)
    figures.draw_run(run, measured)
    if can_film(loaded.domain, figures.FILM):
        film = run.within(f"figures/{figures.FILM}")
        try:
            write_video(loaded, "internal-rl", film, episodes=2, seed=stream_seed(config.seed, "evaluate"))
        except UserError as error:  # of the world's renderer: the rest of the summary needs none
            announce(f"no film: {error}", quiet)
    summary = {
        "seed": config.seed,
        **measured,
        "episodes": config.internal_rl.updates * config.internal_rl.batch_size,
        **_costs(run, time.monotonic() - began, parent_peak_mb),
    }
    run.write_summary(summary)


def show_episodes(run: LoadedRun, *, quiet: bool = False) -> None:
    """The analysis ``episodes`` of a run, which the figure of the gate and the report's player show, unless it is there
    with all that the run has to show: probes may have come later."""
    episodes = read_episodes(run.folder).get("episodes", [])
    believed = any(episode.get("belief") is not None for episode in episodes)
    if not episodes or (run.folder.has_checkpoint("probes") and not believed):
        run_analysis("episodes", run, quiet=quiet)


def _costs(run: RunFolder, evaluation_seconds: float, parent_peak_mb: float | None) -> dict[str, Any]:
    """seconds in all, phase_seconds and peak_rss_mb of all processes together, from what the checkpoints say."""
    costs = {phase: run.load_checkpoint(phase)[1] for phase in PHASES}
    phase_seconds = {phase: meta["seconds"] for phase, meta in costs.items()} | {"evaluate": evaluation_seconds}
    peaks = {phase: meta["peak_rss_mb"] for phase, meta in costs.items()} | {"evaluate": peak_rss_mb()}
    seconds, peak = sum(phase_seconds.values()), max(peaks.values())
    if parent_peak_mb is not None:  # the two kinds of RL ran side by side
        seconds -= min(phase_seconds[phase] for phase in RL_PHASES)
        peak = parent_peak_mb + max(peak, sum(peaks[phase] for phase in RL_PHASES))
    return {"seconds": seconds, "phase_seconds": phase_seconds, "peak_rss_mb": peak}


# -- all seeds --------------------------------------------------------------------------------------------------------


@checked_kinds
def reproduce(
    config: ExperimentConfig,
    out: str | os.PathLike[str],
    seeds: Sequence[RunSeed] = (0,),
    *,
    resume: bool = False,
    workers: Processes = 1,
    quiet: bool = False,
    device: str = "cpu",
    track: Tracker | None = None,
) -> dict[str, Any]:
    """The experiment on every seed; writes and returns ``out/summary.json``.

    workers: seeds at the same time, one thread each. With one worker, pretraining and discovery have all threads, and
    the two kinds of RL run side by side where there is more than one core. track: see `training.tracking`.
    """
    check_distinct(seeds=seeds)
    figures.require_matplotlib()
    folder = RunFolder(out)
    with folder.locked():
        open_folder(folder, config, "reproduce", resume=resume, option="--out")
        runs = [folder.child(f"seed-{seed}") for seed in seeds]
        seeded = [with_seed(config, seed) for seed in seeds]
        if workers > 1:
            jobs = [(one, run.path, quiet, device, track) for one, run in zip(seeded, runs, strict=True)]
            in_processes(_reproduce_alone, jobs, at_once=workers)
        else:
            apart = usable_cores() > 1
            for one, run in zip(seeded, runs, strict=True):
                reproduce_seed(one, run.path, quiet=quiet, apart=apart, device=device, track=track)
        summary = {**combined_summary([run.read_summary() for run in runs]), **environment_facts()}
        if folder.read_summary() != summary:
            announce("figures of all seeds", quiet)
            figures.draw_all(folder, runs, summary["task"])
            folder.write_summary(summary)
    return summary


def _reproduce_alone(config: ExperimentConfig, path: Path, quiet: bool, device: str, track: Tracker | None) -> None:
    label_lines(f"seed {config.seed}")
    summary = reproduce_seed(config, path, quiet=quiet, device=device, track=track)
    announce(f"finished in {summary['seconds'] / 60:.1f} minutes", quiet)


def combined_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summaries of several seeds as one: each measure a list over seeds.

    task, subgoals and episodes are those of one seed; peak_rss_mb is the largest.
    """
    return {
        "seeds": [run["seed"] for run in runs],
        **{name: [run.get(name) for run in runs] for name in RESULTS},
        **{name: runs[0][name] for name in ("task", "subgoals", "episodes")},
        "seconds": [run["seconds"] for run in runs],
        "phase_seconds": [run["phase_seconds"] for run in runs],
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
    }
