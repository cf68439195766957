"""Every baseline and every analysis on the seeds of a reproduction: what the paper's figures are drawn from.

    OUT/seed-0/ ...                  the reproduction, with the analyses of its runs
    OUT/study/NAME/seed-0/           a run folder of each variant: config, artefacts, metrics, summary
    OUT/study/config.json            what the study was asked for
    OUT/study/summary.json           all numbers

A variant starts from the base model of the reproduction's seed, changes what its name says and nothing else, and is
measured like it. Whatever is finished is not run again, what was interrupted goes on from its last checkpoint, what
failed leaves ``error.txt``, and the rest go on.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from metacontroller.analysis.rate_distortion import is_aligned, rate_distortion, rate_distortion_of_segments
from metacontroller.analysis.runs import gate_run, inject_run, probe_run, steer_run
from metacontroller.control.switching import GateConfig
from metacontroller.errors import UserError
from metacontroller.phases.cells import Job, in_own_processes
from metacontroller.phases.discover import DiscoverConfig
from metacontroller.phases.pretrain import snapshot_path
from metacontroller.phases.reproduce import (
    BASE_MODEL,
    LoadedRun,
    copy_artefact,
    evaluate_run,
    read_config,
    reproduce_seed,
    run_phase,
)
from metacontroller.presets.gridworld import GridworldConfig, generate, stream_seed, with_seed
from metacontroller.presets.reading import from_plain
from metacontroller.progress import track
from metacontroller.run_folder import RunFolder

FOLDER = "study"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How much of everything."""

    alphas: tuple[float, ...] = (0.001, 0.004, 0.02, 0.1)
    """Weights of the KL, one for each point of the rate-distortion curves."""
    rate_steps: int = 2400
    """Updates of discovery at each point of the rate-distortion curves."""
    discovery_steps: int = 1600
    """Updates of discovery on variants of pretraining."""
    alpha_warmup: tuple[int, int] = (700, 1200)
    """Updates (from, to) of the KL's linear warm-up, on variants of pretraining."""
    snapshots: tuple[int, ...] = (500, 1000)
    """Updates of pretraining after which to discover on the base model."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Weight decays of pretraining; a base model for each, to compare with the snapshot of as many updates."""
    state_loss_weights: tuple[float, ...] = (0.01,)
    """Weights lambda of pretraining's state loss; a base model for each."""
    epsilons: tuple[float, ...] = (0.1,)
    """Shares of the expert's random moves; a base model for each."""
    pretraining_steps: int = 1000
    """Pretraining updates of each base model of weight_decays, state_loss_weights and epsilons."""
    episodes: int = 50_000
    """Episodes of internal RL on each variant."""
    few_seeds: int = 1
    """So many of the seeds have curves, variants and controls; all have the baselines."""
    probe_steps: int = 300
    """Updates of the linear probes."""
    probe_lr: float = 3e-3
    """Learning rate of the linear probes."""
    steer_steps: int = 3200
    """Updates of the supervised controllers (the paper's table)."""
    steer_lr: float = 1e-3
    """Learning rate of the supervised controllers (the paper's table)."""
    walks: int = 1024
    """Walks for each color, free and with its code forced."""
    analysis_episodes: int = 2048
    """Held-out episodes to judge each analysis by."""


STUDIES = {
    "debug": StudyConfig(
        alphas=(0.01,),
        rate_steps=6,
        discovery_steps=6,
        alpha_warmup=(1, 4),
        snapshots=(4,),
        weight_decays=(0.1,),
        state_loss_weights=(0.1,),
        epsilons=(0.1,),
        pretraining_steps=4,
        episodes=64,
        probe_steps=5,
        steer_steps=5,
        walks=16,
        analysis_episodes=64,
    ),
    "laptop": StudyConfig(),
    "quick": StudyConfig(),
    "paper": StudyConfig(
        alphas=(0.0, 0.05, 0.1, 0.17, 0.3, 0.5, 1.0),  # the alphas searched
        rate_steps=64_000,  # as the paper's discovery; all below: our choice where the paper is silent
        discovery_steps=64_000,
        alpha_warmup=(0, 0),
        snapshots=(10_000, 50_000, 100_000),
        weight_decays=(0.0, 0.01, 0.1),
        state_loss_weights=(0.0, 0.1),
        epsilons=(0.05, 0.1, 0.2),  # §4
        pretraining_steps=100_000,
        episodes=1_000_000,
        few_seeds=3,
        probe_steps=8000,  # table of probes
        probe_lr=1e-3,  # the same table
        steer_steps=3200,  # table of supervised controllers
        steer_lr=1e-3,  # the same table
        walks=4096,
        analysis_episodes=4096,
    ),
}
"""By preset."""

Group = Literal["baseline", "rate", "pretraining", "control"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change to the reproduction. value: what is varied in its group, for axes and tables. start: from the base
    model of the seed, from one of its snapshots (the step), from a base model of its own, or from new weights."""

    name: str
    group: Group
    config: GridworldConfig
    value: float | None = None
    start: Literal["base", "own", "new"] | int = "base"
    reinforces: bool = True


def _lasting(config: DiscoverConfig, steps: int) -> DiscoverConfig:
    """The same for so many updates, over as large a share of which the learning rate falls."""
    optimizer = config.optimizer
    falls = round(optimizer.decay_steps * steps / optimizer.steps)
    return replace(config, optimizer=replace(optimizer, steps=steps, decay_steps=falls))


def variants(config: GridworldConfig, study: StudyConfig) -> dict[str, Variant]:
    """All variants by name, in the order in which they are run."""
    found = [*_baselines(config), *_rate_distortion(config, study), *_pretraining(config, study), *_controls(config)]
    return {variant.name: variant for variant in found}


def _baselines(config: GridworldConfig) -> list[Variant]:
    """The paper's baselines beside raw-action RL, which the reproduction has (Fig. 8)."""
    forced = replace(config, meta_controller=replace(config.meta_controller, gate=GateConfig(mode="forced")))
    cotrained = _cotrained(config)
    joint = replace(
        cotrained.discover.optimizer, steps=max(config.pretrain.optimizer.steps, config.discover.optimizer.steps)
    )
    scratch = replace(cotrained, discover=replace(cotrained.discover, optimizer=joint))
    return [
        Variant(name="compile", group="baseline", config=replace(config, discovery="compile")),
        Variant(name="forced-switching", group="baseline", config=forced),
        Variant(name="cotrained-from-pretrained", group="baseline", config=cotrained),
        Variant(name="cotrained-from-scratch", group="baseline", config=scratch, start="new"),
    ]


def _cotrained(config: GridworldConfig) -> GridworldConfig:
    """The base trained along, at pretraining's learning rate."""
    optimizer = replace(config.discover.optimizer, lr=config.pretrain.optimizer.lr)
    return replace(config, discover=replace(config.discover, optimizer=optimizer, train_model=True))


def _controls(config: GridworldConfig) -> list[Variant]:
    """Where the sequence embedder sees episodes turned: the base frozen and co-trained with an embedder as the paper's,
    which sees them as they are. They tell what the turned view does for each."""
    if not config.turned_embedding:
        return []
    compared = (Variant(name="frozen", group="control", config=config), *_baselines(config))
    return [
        replace(
            variant,
            name=f"unturned-{variant.name}",
            group="control",
            config=replace(variant.config, turned_embedding=False),
        )
        for variant in compared
        if variant.name == "frozen" or variant.config.discover.train_model
    ]


def _rate_distortion(config: GridworldConfig, study: StudyConfig) -> list[Variant]:
    """Each alpha, frozen and co-trained, with the Gumbel-sigmoid gate (Fig. 7)."""
    found = []
    gate = replace(config.meta_controller.gate, mode="gumbel-sigmoid")
    for alpha in study.alphas:
        for kind, base in (("frozen", config), ("cotrained", _cotrained(config))):
            discovery = replace(_lasting(base.discover, study.rate_steps), alpha=alpha)
            changed = replace(base, discover=discovery, meta_controller=replace(base.meta_controller, gate=gate))
            name = f"rate-{kind}-{alpha:g}"
            found.append(Variant(name=name, group="rate", config=changed, value=alpha, reinforces=False))
    return found


def _pretraining(config: GridworldConfig, study: StudyConfig) -> list[Variant]:
    """Base models pretrained for less time or otherwise, with the same discovery on each (Fig. A2)."""
    rl = replace(config.internal_rl, episodes=study.episodes)
    discovery = replace(_lasting(config.discover, study.discovery_steps), alpha_warmup=study.alpha_warmup)
    config = replace(config, discover=discovery, internal_rl=rl)
    found = []
    for step in study.snapshots:
        name = f"pretraining-steps-{step}"
        found.append(Variant(name=name, group="pretraining", config=config, value=step, start=step))
    optimizer = replace(config.pretrain.optimizer, steps=study.pretraining_steps, decay_steps=0)  # as at a snapshot
    config = replace(config, pretrain=replace(config.pretrain, optimizer=optimizer, snapshots=()))

    def add(name: str, value: float, changed: GridworldConfig) -> None:
        found.append(Variant(name=name, group="pretraining", config=changed, value=value, start="own"))

    for decay in study.weight_decays:
        decayed = replace(config.pretrain, optimizer=replace(optimizer, weight_decay=decay))
        add(f"weight-decay-{decay:g}", decay, replace(config, pretrain=decayed))
    for weight in study.state_loss_weights:
        pretraining = replace(config.pretrain, state_loss_weight=weight)
        add(f"state-loss-{weight:g}", weight, replace(config, pretrain=pretraining))
    for epsilon in study.epsilons:
        add(f"epsilon-{epsilon:g}", epsilon, replace(config, expert=replace(config.expert, epsilon=epsilon)))
    return found


# -- one cell ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A seed of the reproduction (what: "run"), its analyses ("analyses"), or of the variant named."""

    what: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it leaves its files."""
        reproduced = self.what in ("run", "analyses")
        return out / f"seed-{self.seed}" if reproduced else variant_folder(out, self.what, self.seed)

    def finished(self, out: Path) -> bool:
        """Whether nothing of it is left to do."""
        run = RunFolder(self.folder(out))
        if self.what == "analyses":
            return all(run.read_analysis(name) for name in ANALYSES)
        return bool(run.read_summary())


ANALYSES = ("gate", "injection", "probes", "steering")


def variant_folder(out: Path, name: str, seed: int) -> Path:
    """The run folder of a variant's seed."""
    return out / FOLDER / name / f"seed-{seed}"


def attempt(out: str, cell: Cell, study: StudyConfig, device: str) -> None:
    """Runs a cell, or goes on with it; what went wrong is written to its ``error.txt``."""
    folder = cell.folder(Path(out))
    failure = folder / "error.txt"
    try:
        if cell.what == "run":
            config = with_seed(read_config(RunFolder(out)), cell.seed)
            reproduce_seed(config, folder, quiet=True, device=device)
        elif cell.what == "analyses":
            analyse(RunFolder(folder), study, device)
        else:
            run_variant(Path(out), cell, study, device)
        failure.unlink(missing_ok=True)
    except Exception:
        folder.mkdir(parents=True, exist_ok=True)
        failure.write_text(traceback.format_exc())


def analyse(run: RunFolder, study: StudyConfig, device: str) -> None:
    """All analyses of a reproduced run that are not there yet."""
    episodes = study.analysis_episodes
    training: dict[str, Any] = {"batch_size": 128, "episodes": episodes, "quiet": True, "device": device}
    calls: dict[str, Callable[[], Any]] = {
        "gate": lambda: gate_run(run, episodes=episodes, device=device),
        "injection": lambda: inject_run(run, walks=study.walks, device=device),
        "probes": lambda: probe_run(run, steps=study.probe_steps, lr=study.probe_lr, **training),
        "steering": lambda: steer_run(run, steps=study.steer_steps, lr=study.steer_lr, **training),
    }
    assert tuple(calls) == ANALYSES
    for name, call in calls.items():
        if not run.read_analysis(name):
            began = time.monotonic()
            found = call()
            run.write_analysis(name, {**found, "seconds": time.monotonic() - began})


def run_variant(out: Path, cell: Cell, study: StudyConfig, device: str) -> None:
    """Its phases, resumed if they were begun, and its summary."""
    variant = variants(read_config(RunFolder(out)), study)[cell.what]
    config, run = with_seed(variant.config, cell.seed), RunFolder(cell.folder(out))
    source = RunFolder(out / f"seed-{cell.seed}")
    phases = ["discover"]
    run.write_config(config)
    if variant.start == "base":
        copy_artefact(BASE_MODEL, source.path, run.path)
    elif variant.start == "own":
        phases.insert(0, "pretrain")
    elif variant.start != "new":
        snapshot = snapshot_path(source, variant.start)
        copy_artefact(snapshot.stem, snapshot.parent, run.path)
        os.replace(run.path / snapshot.name, run.path / f"{BASE_MODEL}.safetensors")
    if variant.reinforces:
        phases.append("internal_rl")
    for phase in phases:
        run_phase(phase, config, run.path, True, device)
    began = time.monotonic()
    loaded = LoadedRun(folder=run, config=config, device=device)
    measured = measure_variant(loaded, reinforced=variant.reinforces)
    phase_seconds = {phase: run.load_checkpoint(phase)[1]["seconds"] for phase in phases}
    phase_seconds["evaluate"] = time.monotonic() - began
    seconds = sum(phase_seconds.values())
    run.write_summary({"seed": cell.seed, **measured, "seconds": seconds, "phase_seconds": phase_seconds})


def measure_variant(run: LoadedRun, *, reinforced: bool) -> dict[str, Any]:
    """What a variant is judged by, all of it on new layouts."""
    episodes, seed = run.config.evaluate.episodes, stream_seed(run.seed, "evaluate")
    model, controlled, source = run.model, run.meta_controller, generate(run.config, "discover")
    if run.segmentation is not None:
        found = rate_distortion_of_segments(model, run.segmentation, controlled, source, episodes, seed)
    else:
        found = rate_distortion(model, controlled, source, episodes, seed)
    if reinforced:
        found["internal_rl_success"] = evaluate_run(run, "internal-rl", episodes=episodes, seed=seed)["success"]
    return {**found, "aligned": is_aligned(found)}


# -- all cells --------------------------------------------------------------------------------------------------------


def study(
    config: StudyConfig,
    out: str | os.PathLike[str],
    seeds: list[int],
    *,
    workers: int = 1,
    quiet: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Runs what is left of the study in ``out``, which holds a reproduction's config; writes and returns its summary.

    workers: cells at the same time, each in a process of its own with one thread; with one worker in this process.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds are {seeds}; give at least one, each once.")
    if workers < 1:
        raise UserError(f"workers is {workers}; expected at least 1.")
    folder, own = RunFolder(out), RunFolder(Path(out) / FOLDER)
    if (own.path / "config.json").exists() and from_plain(StudyConfig, own.read_config()) != config:
        raise UserError(f"{own.path} was started with other settings; ask for the same, or move that folder away.")
    own.write_config(config)
    named = variants(read_config(folder), config)
    cells = _cells(named, seeds, config.few_seeds)
    left = [cell for cell in cells if not cell.finished(folder.path)]
    done = len(cells) - len(left)

    with track(len(cells), "study", start=done, quiet=quiet) as progress:

        def next_job() -> Job | None:
            for cell in left:
                if cell.what == "run" or Cell("run", cell.seed).finished(folder.path):
                    left.remove(cell)
                    return str(folder.path), cell, config, device
            return None

        def advance() -> None:
            nonlocal done
            done += 1
            own.write_summary(_summary(folder.path, cells, named))  # so that a report can be made on the way
            progress.update(done)

        if workers == 1:
            while (job := next_job()) is not None:
                attempt(*job)
                advance()
        else:
            in_own_processes(attempt, next_job, workers, advance)
    summary = _summary(folder.path, cells, named)
    own.write_summary(summary)
    return summary


def _cells(named: dict[str, Variant], seeds: list[int], few: int) -> list[Cell]:
    """In the order in which they are run: what every seed has comes first."""
    baselines = [variant.name for variant in named.values() if variant.group == "baseline"]
    rest = [variant.name for variant in named.values() if variant.group != "baseline"]
    shared = [Cell(what, seed) for what in ("run", *baselines, "analyses") for seed in seeds]
    return shared + [Cell(what, seed) for what in rest for seed in seeds[:few]]


def _summary(out: Path, cells: list[Cell], named: dict[str, Variant]) -> dict[str, Any]:
    """cells: a row each with what was measured, or why not; seconds: of all cells, added up."""
    rows, seconds = [], 0.0
    for cell in cells:
        run = RunFolder(cell.folder(out))
        if cell.what == "analyses":
            seconds += sum(run.read_analysis(name).get("seconds", 0.0) for name in ANALYSES)
            found: dict[str, Any] = {}
        else:
            found = run.read_summary()
            seconds += found.get("seconds", 0.0)
        row: dict[str, Any] = {"name": cell.what, "seed": cell.seed, "status": _status(out, cell)}
        if cell.what in named:
            kept = ("internal_rl_success", "rate", "distortion", "aligned", "seconds")
            kept += ("gate_recall", "gate_precision", "gate_binary_fraction", "segment_recall", "segment_precision")
            row |= {"group": named[cell.what].group, "value": named[cell.what].value}
            row |= {name: found[name] for name in kept if name in found}
        rows.append(row)
    return {"cells": rows, "seconds": seconds}


def _status(out: Path, cell: Cell) -> str:
    if cell.finished(out):
        return "finished"
    failure = cell.folder(out) / "error.txt"
    if failure.exists():
        return f"failed: {failure.read_text().strip().splitlines()[-1]}"
    return "not run"
