"""One phase of a run folder, as its config says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from metacontroller.baselines.compile import build_compile, discover_compile
from metacontroller.baselines.raw_action_rl import raw_action_rl
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Generate
from metacontroller.domains.base import Domain, Split, demonstrations
from metacontroller.domains.registry import domain_of
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.artefacts import BASE_MODEL, load_artefact
from metacontroller.phases.discover import discover
from metacontroller.phases.evolution import EvolutionConfig, evolution
from metacontroller.phases.internal_rl import internal_rl
from metacontroller.phases.policy_gradient import Reset
from metacontroller.phases.pretrain import pretrain
from metacontroller.recipes.config import (
    ExperimentConfig,
    build_meta_controller,
    build_model,
    check_phases,
    load_run,
    to_json,
)
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.progress import announce
from metacontroller.training.seeding import stream_seed
from metacontroller.training.tracking import Tracker, track_with


def run_pretrain(config: ExperimentConfig, run: RunFolder, *, resume: bool, quiet: bool, device: str) -> SteerableModel:
    """Phase 1 in a run folder; writes config.json too."""
    run.refuse_begun("pretrain", resume=resume)  # before the config is replaced
    check_phases(config)
    model, domain = build_model(config).to(device), domain_of(config.domain)
    run.versions = model.versions
    if processes(device).is_main:
        run.write_config(to_json(config))
    tell_window("pretrain", domain, device, quiet=quiet)
    source = demonstrations(domain, "pretrain")
    options: dict[str, Any] = {"validation": _validation(domain, "pretrain"), "resume": resume, "quiet": quiet}
    options["decisions"] = domain.decisions if config.pretrain.clips else None
    return pretrain(config.pretrain, model, source, run, **options)


def run_discover(config: ExperimentConfig, run: RunFolder, *, resume: bool, quiet: bool, device: str) -> MetaController:
    """Phase 2 in a run folder that holds a base model; a model that is trained along may start from new weights."""
    domain = domain_of(config.domain)
    run.versions = domain.data_versions()
    if config.discover.train_model and not (run.path / f"{BASE_MODEL}.safetensors").exists():
        model = build_model(config).to(device)
    else:
        model = load_artefact(config.model.Model, run, BASE_MODEL, device)
    meta_controller = build_meta_controller(config).to(device)
    source = demonstrations(domain, "discover")
    augment = domain.augment if config.discover.symmetry_augmentation else None
    options: dict[str, Any] = {"augment": augment, "gate_tolerance": domain.gate_tolerance}
    options |= {"validation": _validation(domain, "discover"), "resume": resume, "quiet": quiet}
    if config.discovery == "compile":
        seed, dim_latent = stream_seed(config.seed, "meta_controller"), config.meta_controller.dim_latent
        segmentation = build_compile(config.compile, model, domain.spec().encoder, dim_latent, seed).to(device)
        segmentation.versions = run.versions
        return discover_compile(config.compile, model, segmentation, meta_controller, source, run, **options)
    if config.discover.guided_updates:
        options["positions"] = domain.positions
    if config.discover.clips:
        options["decisions"] = domain.decisions
    options["objective"] = config.discovery
    return discover(config.discover, model, meta_controller, source, run, **options)


def run_internal_rl(
    config: ExperimentConfig, run: RunFolder, *, resume: bool, quiet: bool, device: str
) -> MetaController:
    """Phase 3 in a run folder that holds a base model and a metacontroller."""
    acting = _acting("internal-rl", config, run, quiet=quiet, device=device)
    return internal_rl(config.internal_rl, *acting, run, resume=resume, quiet=quiet)


def run_evolution(
    config: ExperimentConfig, run: RunFolder, settings: EvolutionConfig, *, resume: bool, quiet: bool, device: str
) -> MetaController:
    """Phase 3 without gradients in a run folder that holds a base model and a metacontroller."""
    settings = replace(settings, seed=stream_seed(config.seed, "internal_rl"))
    return evolution(
        settings, *_acting("evolve", config, run, quiet=quiet, device=device), run, resume=resume, quiet=quiet
    )


def _acting(
    phase: str, config: ExperimentConfig, run: RunFolder, *, quiet: bool, device: str
) -> tuple[SteerableModel, MetaController, Reset]:
    """What acts in a run folder, and what starts its episodes."""
    loaded = load_run(run, device, config)
    tell_window(phase, loaded.domain, device, quiet=quiet)
    model, meta_controller = loaded.model, loaded.meta_controller
    meta_controller.versions = meta_controller.versions | run.versions
    return model, meta_controller, post_training(loaded.domain)


def run_raw_action_rl(
    config: ExperimentConfig, run: RunFolder, *, resume: bool, quiet: bool, device: str
) -> SteerableModel:
    """The baseline, on a copy of the run folder's base model."""
    loaded = load_run(run, device, config)
    tell_window("raw-action-rl", loaded.domain, device, quiet=quiet)
    model = loaded.base
    model.versions = model.versions | run.versions
    return raw_action_rl(config.raw_action_rl, model, post_training(loaded.domain), run, resume=resume, quiet=quiet)


def _validation(domain: Domain, phase: Split) -> Generate | None:
    """The episodes whose loss may stand beside that of a phase's training, if a world has some."""
    return demonstrations(domain, "validation") if domain.validates(phase) else None


def tell_window(phase: str, domain: Domain, device: str, *, quiet: bool) -> None:
    """Says so where episodes may be longer than what a model is shown of them at once."""
    spec = domain.spec()
    if spec.window is not None and spec.max_steps > spec.window:
        announce(
            f"{phase}: episodes may take {spec.max_steps:,} steps and models learn from {spec.window:,} at once "
            f"(domain.window), so attention acts by the last {spec.window:,}",
            quiet or not processes(device).is_main,
        )


def post_training(domain: Domain) -> Reset:
    """Starts episodes of a world's post-training task."""
    return lambda n, generator: domain.reset(n, generator)


RUN_PHASE: dict[str, Callable[..., Any]] = {
    "pretrain": run_pretrain,
    "discover": run_discover,
    "internal_rl": run_internal_rl,
    "raw_action_rl": run_raw_action_rl,
}
PHASES = tuple(RUN_PHASE)
RL_PHASES = ("internal_rl", "raw_action_rl")


def run_phase(
    phase: str, config: ExperimentConfig, folder: Path, quiet: bool, device: str, track: Tracker | None = None
) -> None:
    """One phase, resumed if it was begun. track: see `training.tracking`."""
    RUN_PHASE[phase](config, track_with(RunFolder(folder), track, quiet=quiet), resume=True, quiet=quiet, device=device)
