"""Analyses of a run folder: each reads its config and artefacts, writes analyses/NAME.json and returns that."""

from __future__ import annotations

from typing import Any

import torch

from metacontroller.analysis.codes import injected_codes
from metacontroller.analysis.probing import probe_layers
from metacontroller.analysis.steering import steer_layers
from metacontroller.analysis.switching import gate_report
from metacontroller.errors import UserError
from metacontroller.models.transformer import Transformer
from metacontroller.phases.pretrain import snapshot_path
from metacontroller.phases.reproduce import gate_of_run, load_run
from metacontroller.presets.gridworld import build_model, generate, stream_seed, subgoals
from metacontroller.run_folder import RunFolder, module_tensors

Found = dict[str, Any]


def probe_run(
    run: RunFolder, *, steps: int, batch_size: int, lr: float, episodes: int, quiet: bool, device: str
) -> Found:
    """Linear probes of the subgoal at every layer of the base model (Fig. 3, A1), and of it as it was before and during
    pretraining, where the run has snapshots. The final probes go to probes.safetensors."""
    loaded = load_run(run, device)
    config = loaded.config
    training = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "episodes": episodes,
        "seed": stream_seed(config.seed, "analyse"),
        "quiet": quiet,
    }

    def probed(model: Transformer) -> Any:
        source = generate(config, "discover")
        return probe_layers(model.to(device), source, subgoals=len(subgoals(config)), **training)

    models: dict[int, Transformer] = {0: build_model(config)}
    for step in config.pretrain.snapshots:
        if snapshot_path(run, step).exists():
            models[step] = Transformer.init_and_load(snapshot_path(run, step))
    over_training = {step: probed(model).accuracy for step, model in models.items()} if len(models) > 1 else {}
    final = probed(loaded.base)
    run.save_checkpoint("probes", module_tensors("probes", final.probes), {"step": steps})
    found = {name: value for name, value in final._asdict().items() if name != "probes"}
    if over_training:
        over_training[config.pretrain.optimizer.steps] = final.accuracy
        found["over_training"] = {"steps": list(over_training), "accuracy": list(over_training.values())}
    return _written(run, "probes", {**found, "steps": steps, "batch_size": batch_size, "lr": lr})


def steer_run(
    run: RunFolder, *, steps: int, batch_size: int, lr: float, episodes: int, quiet: bool, device: str
) -> Found:
    """Supervised controllers with true labels at every layer, chained on the post-training task (Fig. 4)."""
    loaded = load_run(run, device)
    config = loaded.config
    found = steer_layers(
        loaded.base,
        generate(config, "discover"),
        config.environment,
        config.post_task,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        episodes=episodes,
        seed=stream_seed(config.seed, "analyse"),
        subgoals=subgoals(config),
        quiet=quiet,
    )
    return _written(run, "steering", {**found._asdict(), "steps": steps, "batch_size": batch_size, "lr": lr})


def inject_run(run: RunFolder, *, walks: int, device: str) -> Found:
    """Each subgoal's code forced in the middle of episodes (Fig. A4)."""
    loaded = load_run(run, device)
    config = loaded.config
    found = injected_codes(
        loaded.model,
        loaded.meta_controller,
        config.environment,
        config.tasks,
        codes=config.evaluate.codes,
        layouts_per_code=config.evaluate.layouts_per_code,
        walks=walks,
        generator=torch.Generator(device).manual_seed(stream_seed(config.seed, "analyse")),
        subgoals=subgoals(config),
    )
    return _written(run, "injection", {**found._asdict(), "walks": walks})


def gate_run(run: RunFolder, *, episodes: int, device: str) -> Found:
    """The gate against true subgoal changes at tolerances 0, 1, 2, and its histograms (Fig. 6, A3)."""
    loaded = load_run(run, device)
    beta, _, fresh = gate_of_run(loaded, episodes, stream_seed(loaded.seed, "analyse"))
    if fresh.segments is None:
        raise UserError("the episodes carry no segments; give a source that labels subgoals.")
    return _written(run, "gate", {**gate_report(beta, fresh.segments, fresh.lengths), "episodes": episodes})


def _written(run: RunFolder, name: str, found: Found) -> Found:
    run.write_analysis(name, found)
    return found
