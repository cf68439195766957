"""The whole experiment, seed by seed: pretrain, discover, internal RL beside raw-action RL, measure, draw.

    OUT/config.json, summary.json, figures/    of all seeds
    OUT/seed-0/ ...                            a run folder each: all phases' artefacts, metrics, summary, figures

Each phase is resumed from its last checkpoint, which also says how long the work that it holds has taken.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from metacontroller.analysis import figures
from metacontroller.analysis.codes import CodeMeaning, code_subgoal_bits, unseen_transition_share
from metacontroller.analysis.summary import combined_summary, environment_facts
from metacontroller.baselines.compile import CompILE, build_compile, discover_compile
from metacontroller.control.metacontroller import MetaController
from metacontroller.envs.gridworld_pinpad import PinpadBatch
from metacontroller.errors import MissingFileError, UserError
from metacontroller.models.transformer import Transformer
from metacontroller.phases.discover import discover
from metacontroller.phases.evaluate import HeldOutGate, Policy, evaluate, gate_on_new_layouts
from metacontroller.phases.internal_rl import internal_rl, raw_action_rl, task_grids
from metacontroller.phases.parallel import processes
from metacontroller.phases.pretrain import pretrain
from metacontroller.presets.gridworld import (
    GridworldConfig,
    build_meta_controller,
    build_model,
    embedded_view,
    from_json,
    generate,
    stream_seed,
    subgoals,
    with_seed,
)
from metacontroller.progress import announce
from metacontroller.run_folder import RunFolder, peak_rss_mb

RL_PHASES = ("internal_rl", "raw_action_rl")
PHASES = ("pretrain", "discover", *RL_PHASES)

BASE_MODEL = "base_model"
RAW_MODEL = "raw_action_model"
COTRAINED_MODEL = "cotrained_model"
META_CONTROLLER = "meta_controller"
SEGMENTATION = "compile"
POLICY = "internal_rl_policy"

_MADE_BY = {
    BASE_MODEL: "pretrain",
    RAW_MODEL: "internal-rl --raw",
    COTRAINED_MODEL: "discover",
    META_CONTROLLER: "discover",
    SEGMENTATION: "discover",
    POLICY: "internal-rl",
}


# -- one phase of a run folder ----------------------------------------------------------------------------------------


def read_config(run: RunFolder) -> GridworldConfig:
    """The config in a run folder."""
    return from_json(run.read_config())


def load_artefact(kind: type, run: RunFolder, name: str, device: str) -> Any:
    """The module that a phase left in the run folder; MissingFileError says which phase to run first."""
    path = run.path / f"{name}.safetensors"
    if not path.exists():
        raise MissingFileError(f"{run.path} has no {path.name}; run `metacontroller {_MADE_BY[name]}` on it first.")
    return kind.init_and_load(path).to(device)


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run folder with its config, and with what its phases left there, each loaded when it is first asked for.

    Whoever measures or draws a run takes its parts from here, so that all of them judge the same model.
    """

    folder: RunFolder
    config: GridworldConfig
    device: str

    @property
    def seed(self) -> int:
        """From which all seeds of the run derive, see `stream_seed`."""
        return self.config.seed

    @cached_property
    def base(self) -> Transformer:
        """The model that pretraining left."""
        return load_artefact(Transformer, self.folder, BASE_MODEL, self.device)

    @cached_property
    def model(self) -> Transformer:
        """The model that the metacontroller steers: the base, or the one that discovery trained along."""
        if not self.config.discover.train_model:
            return self.base
        return load_artefact(Transformer, self.folder, COTRAINED_MODEL, self.device)

    @cached_property
    def raw_model(self) -> Transformer:
        """The base after raw-action RL."""
        return load_artefact(Transformer, self.folder, RAW_MODEL, self.device)

    @cached_property
    def meta_controller(self) -> MetaController:
        """As discovery left it; its policy is the prior."""
        return load_artefact(MetaController, self.folder, META_CONTROLLER, self.device)

    @cached_property
    def segmentation(self) -> CompILE | None:
        """CompILE's, where it stands in place of discovery."""
        if self.config.discovery != "compile":
            return None
        return load_artefact(CompILE, self.folder, SEGMENTATION, self.device)

    @cached_property
    def policy(self) -> MetaController:
        """The same with the policy that internal RL trained."""
        return load_artefact(MetaController, self.folder, POLICY, self.device)


def load_run(folder: RunFolder, device: str) -> LoadedRun:
    """The run in a folder, as its config.json says."""
    return LoadedRun(folder=folder, config=read_config(folder), device=device)


def run_pretrain(config: GridworldConfig, run: RunFolder, *, resume: bool, quiet: bool, device: str) -> Transformer:
    """Phase 1 in a run folder; writes config.json too."""
    run.refuse_begun("pretrain", resume=resume)  # before the config is replaced
    model = build_model(config).to(device)
    if processes(device).is_main:
        run.write_config(config)
    return pretrain(config.pretrain, model, generate(config, "pretrain"), run, resume=resume, quiet=quiet)


def run_discover(config: GridworldConfig, run: RunFolder, *, resume: bool, quiet: bool, device: str) -> MetaController:
    """Phase 2 in a run folder that holds a base model; a model that is trained along may start from new weights."""
    if config.discover.train_model and not (run.path / f"{BASE_MODEL}.safetensors").exists():
        model = build_model(config).to(device)
    else:
        model = load_artefact(Transformer, run, BASE_MODEL, device)
    meta_controller, source = build_meta_controller(config).to(device), generate(config, "discover")
    options: dict[str, Any] = {"embedded_view": embedded_view(config), "resume": resume, "quiet": quiet}
    if config.discovery == "compile":
        seed = stream_seed(config.seed, "meta_controller")
        segmentation = build_compile(config.compile, model, config.meta_controller.dim_latent, seed).to(device)
        return discover_compile(config.compile, model, segmentation, meta_controller, source, run, **options)
    return discover(config.discover, model, meta_controller, source, run, **options)


def copy_artefact(name: str, source: Path, folder: Path) -> None:
    """Copies what a phase left in the folder ``source``, if it is there; under its name only once it is whole."""
    path = source / f"{name}.safetensors"
    if path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{path.name}.{os.getpid()}.tmp"
        shutil.copyfile(path, draft)
        os.replace(draft, folder / path.name)


def run_internal_rl(
    config: GridworldConfig, run: RunFolder, *, resume: bool, quiet: bool, device: str
) -> MetaController:
    """Phase 3 in a run folder that holds a base model and a metacontroller."""
    loaded, grids = LoadedRun(folder=run, config=config, device=device), _post_task_grids(config)
    rl = config.internal_rl
    return internal_rl(rl, loaded.model, loaded.meta_controller, grids, run, resume=resume, quiet=quiet)


def run_raw_action_rl(
    config: GridworldConfig, run: RunFolder, *, resume: bool, quiet: bool, device: str
) -> Transformer:
    """The baseline, on a copy of the run folder's base model."""
    model = load_artefact(Transformer, run, BASE_MODEL, device)
    return raw_action_rl(config.raw_action_rl, model, _post_task_grids(config), run, resume=resume, quiet=quiet)


def _post_task_grids(config: GridworldConfig) -> Callable[[int, torch.Generator], PinpadBatch]:
    return lambda n, generator: task_grids(config.environment, config.post_task, n, generator, subgoals(config))


RUN_PHASE: dict[str, Callable[..., Any]] = {
    "pretrain": run_pretrain,
    "discover": run_discover,
    "internal_rl": run_internal_rl,
    "raw_action_rl": run_raw_action_rl,
}


# -- one seed ---------------------------------------------------------------------------------------------------------


def reproduce_seed(
    config: GridworldConfig, folder: Path, *, quiet: bool = False, side_by_side: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """All phases of one seed, from wherever the folder stands; returns its summary, which is written last.

    side_by_side: the two kinds of RL in a process each, with one thread each.
    """
    run = RunFolder(folder)
    if finished := run.read_summary():
        return finished
    for phase in ("pretrain", "discover"):
        run_phase(phase, config, folder, quiet, device)
    if side_by_side:
        in_processes(run_phase, [(phase, config, folder, quiet, device) for phase in RL_PHASES], 2)
    else:
        for phase in RL_PHASES:
            run_phase(phase, config, folder, quiet, device)
    began = time.monotonic()
    loaded = LoadedRun(folder=run, config=config, device=device)
    measured = measure(loaded, quiet)
    announce("figures of the run", quiet)
    figures.draw_run(loaded, measured, gate_to_draw(loaded))
    summary = {
        "seed": config.seed,
        **measured,
        "episodes": config.internal_rl.updates * config.internal_rl.batch_size,
        **_costs(run, time.monotonic() - began, side_by_side),
    }
    run.write_summary(summary)
    return summary


def _costs(run: RunFolder, evaluation_seconds: float, side_by_side: bool) -> dict[str, Any]:
    """seconds in all, phase_seconds and peak_rss_mb, from what the checkpoints say."""
    costs = {phase: run.load_checkpoint(phase)[1] for phase in PHASES}
    phase_seconds = {phase: meta["seconds"] for phase, meta in costs.items()} | {"evaluate": evaluation_seconds}
    rl_seconds = [phase_seconds[phase] for phase in RL_PHASES]
    rl_peaks = [costs[phase]["peak_rss_mb"] for phase in RL_PHASES]
    own_peak = max(peak_rss_mb(), costs["pretrain"]["peak_rss_mb"], costs["discover"]["peak_rss_mb"])
    if side_by_side:
        seconds, peak = max(rl_seconds), own_peak + sum(rl_peaks)
    else:
        seconds, peak = sum(rl_seconds), max(own_peak, *rl_peaks)
    seconds += sum(value for phase, value in phase_seconds.items() if phase not in RL_PHASES)
    return {"seconds": seconds, "phase_seconds": phase_seconds, "peak_rss_mb": peak}


def run_phase(phase: str, config: GridworldConfig, folder: Path, quiet: bool, device: str) -> None:
    """One phase, resumed if it was begun."""
    run = RunFolder(folder)
    RUN_PHASE[phase](config, run, resume=True, quiet=quiet, device=device)


def gate_of_run(run: LoadedRun, episodes: int, seed: int) -> HeldOutGate:
    """The gate that acts in a run, along ``episodes`` held-out ones of experts: whatever says something about a run's
    gate reads it here.

    After CompILE, codes and boundaries are its own and the gate is the one that learned to tell them from the past;
    the metacontroller's acausal encoder was never trained.
    """
    source = generate(run.config, "discover")
    return gate_on_new_layouts(run.model, run.meta_controller, source, episodes, seed, segmentation=run.segmentation)


def gate_to_draw(run: LoadedRun) -> HeldOutGate:
    """The handful of episodes that the figure of the gate shows."""
    return gate_of_run(run, figures.GATE_EPISODES, stream_seed(run.seed, "evaluate"))


def evaluate_run(
    run: LoadedRun, policy: Policy, *, task: Sequence[int] | None = None, episodes: int, seed: int
) -> dict[str, Any]:
    """`evaluate` with the run's model and metacontroller for that policy, by default on its post-training task."""
    config, task = run.config, run.config.post_task if task is None else task
    if policy in ("base", "raw"):
        model, controlled = run.base if policy == "base" else run.raw_model, None
    else:
        model, controlled = run.model, run.meta_controller if policy == "prior" else run.policy
    return evaluate(model, controlled, config.environment, policy, task, episodes, seed, subgoals=subgoals(config))


def discovery_figures(run: LoadedRun, seed: int, episodes: int) -> dict[str, float]:
    """What discovery is judged by, on ``episodes`` new ones: how the gate meets subgoals, and what fixed codes tell."""
    gate = gate_of_run(run, episodes, seed)
    return {
        **gate.figures(),
        "code_subgoal_bits": _code_meaning(run, torch.Generator(run.device).manual_seed(seed)).bits,
    }


def _code_meaning(run: LoadedRun, generator: torch.Generator) -> CodeMeaning:
    settings = run.config.evaluate
    return code_subgoal_bits(
        run.model,
        run.meta_controller,
        run.config.environment,
        codes=settings.codes,
        layouts_per_code=settings.layouts_per_code,
        generator=generator,
        subgoals=subgoals(run.config),
    )


def measure(run: LoadedRun, quiet: bool) -> dict[str, Any]:
    """What a finished run is judged by, all of it on new layouts."""
    config, episodes, seed = run.config, run.config.evaluate.episodes, stream_seed(run.seed, "evaluate")

    def success(policy: Policy) -> float:
        announce(f"evaluate: success of {policy}", quiet)
        return evaluate_run(run, policy, episodes=episodes, seed=seed)["success"]

    announce("evaluate: what codes mean", quiet)
    generator = torch.Generator(run.device).manual_seed(seed)
    meaning = _code_meaning(run, generator)
    announce("evaluate: transitions that no task has", quiet)
    unseen = unseen_transition_share(
        run.base,
        config.environment,
        config.tasks,
        episodes=episodes,
        generator=generator,
        subgoals=subgoals(config),
    )
    rates = {
        "internal_rl_success": success("internal-rl"),
        "raw_action_success": success("raw"),
        "prior_success": success("prior"),
        "raw_initial_success": success("base"),
    }
    announce("evaluate: the gate against subgoals", quiet)
    return {
        **rates,
        **gate_of_run(run, episodes, seed).figures(),
        "code_subgoal_bits": meaning.bits,
        "unseen_transition_share": unseen,
        "code_color_share": meaning.share.tolist(),
    }


# -- all seeds --------------------------------------------------------------------------------------------------------


def reproduce(
    config: GridworldConfig,
    out: str | os.PathLike[str],
    seeds: Sequence[int] = (0,),
    *,
    resume: bool = False,
    workers: int = 1,
    quiet: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """The experiment on every seed; writes and returns ``out/summary.json``.

    workers: seeds at the same time, one thread each. With one worker, pretraining and discovery have all threads, and
    the two kinds of RL run side by side where there is more than one core.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds are {list(seeds)}; give at least one, each once.")
    if workers < 1:
        raise UserError(f"workers is {workers}; expected at least 1.")
    figures.require_matplotlib()
    folder = RunFolder(out)
    open_folder(folder, config, resume=resume, option="--out")
    configs = [with_seed(config, seed) for seed in seeds]
    paths = [folder.path / f"seed-{seed}" for seed in seeds]
    if workers == 1:
        pairs = usable_cores() > 1
        for seeded, path in zip(configs, paths, strict=True):
            reproduce_seed(seeded, path, quiet=quiet, side_by_side=pairs, device=device)
    else:
        jobs = [(seeded, path, quiet, device) for seeded, path in zip(configs, paths, strict=True)]
        in_processes(_reproduce_alone, jobs, workers)
    runs = [RunFolder(path) for path in paths]
    summary = {**combined_summary([run.read_summary() for run in runs]), **environment_facts()}
    if folder.read_summary() != summary:
        announce("figures of all seeds", quiet)
        figures.draw_all(config, folder, runs)
        folder.write_summary(summary)
    return summary


def open_folder(folder: RunFolder, config: GridworldConfig, *, resume: bool, option: str) -> None:
    """Writes the config into a new folder, or checks that a resumed one holds the same."""
    if not (folder.path / "config.json").exists():
        if folder.path.is_dir() and any(folder.path.iterdir()):
            raise UserError(f"{folder.path} holds files of something else; choose another {option}.")
        folder.write_config(config)
        return
    if not resume:
        raise UserError(f"{folder.path} holds a run; add --resume to go on with it, or choose another {option}.")
    if with_seed(read_config(folder), config.seed) != with_seed(config, config.seed):
        raise UserError(
            f"{folder.path} was started with another configuration; leave out --preset and --config to go on with it, "
            f"or choose another {option}."
        )


def _reproduce_alone(config: GridworldConfig, path: Path, quiet: bool, device: str) -> None:
    # quiet, because the bars of several processes would overwrite each other
    summary = reproduce_seed(config, path, quiet=True, device=device)
    if not quiet:
        print(f"seed {config.seed}: finished in {summary['seconds'] / 60:.1f} minutes", file=sys.stderr, flush=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], at_once: int) -> None:
    """Calls ``function(*job)`` for every job, each in a fresh process with one thread.

    If one fails, or this process is interrupted, the others are ended: each phase can be resumed.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(at_once, mp_context=spawn, initializer=start_worker)
    try:
        for future in as_completed([pool.submit(function, *job) for job in jobs]):
            future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()


def start_worker() -> None:
    """Prepares a worker process: one thread, and an end when its parent ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent too, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise train on, beside the run that resumes its folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
