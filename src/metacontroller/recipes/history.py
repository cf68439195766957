"""Settings of a run that change after it has begun: which may, and history.jsonl, which tells what changed and when."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from metacontroller.errors import UserError
from metacontroller.recipes.config import (
    ExperimentConfig,
    check_phases,
    read_config,
    refuse_other_recipe,
    to_json,
    with_seed,
)
from metacontroller.storage.run_folder import RunFolder

Phase = Literal["pretrain", "discover", "internal_rl", "raw_action_rl"]

CHANGEABLE: dict[Phase, tuple[str, ...]] = {
    "discover": ("discover", "discovery", "compile", "meta_controller"),
    "internal_rl": ("internal_rl", "domain.success_return"),
    "raw_action_rl": ("raw_action_rl", "domain.success_return"),
}
"""The parts of a config on which nothing depends that was made before a phase."""
DEPENDENT: dict[Phase, tuple[str, ...]] = {
    "discover": ("discover", "internal_rl", "evolution"),
    "internal_rl": ("internal_rl",),
    "raw_action_rl": ("raw_action_rl",),
}
"""Checkpoints that depend on these parts; those of `ACTED` depend on the world's."""
ACTED = ("internal_rl", "raw_action_rl", "evolution")


def changed_config(run: RunFolder, config: ExperimentConfig, phase: Phase) -> ExperimentConfig:
    """The config asked for, for a phase of a run. UserError if it differs from the run's in more than the parts that
    the phase may change, or where a checkpoint of the run depends on what differs."""
    changes = differences(read_config(run), config)
    if not changes:
        return config
    refuse_other_recipe(run, phase)
    for name in changes:
        if not any(f"{name}.".startswith(f"{part}.") for part in CHANGEABLE[phase]):
            raise UserError(
                f"{name} is fixed in {run.path}: {phase} changes {', '.join(CHANGEABLE[phase])} alone; leave it out, "
                "or start another run by pretrain."
            )
    if with_seed(config, config.seed) != config:
        raise UserError("the seeds of phases derive from the run's; leave out --config for them.")
    for name in changes:
        for checkpoint in ACTED if name.startswith("domain.") else DEPENDENT[phase]:
            if run.has_checkpoint(checkpoint):
                raise UserError(
                    f"{run.path} holds {checkpoint}.safetensors, which depends on {name}; leave out "
                    "--config to go on with it, or move that file away to begin the phase anew."
                )
    check_phases(config)
    return config


def keep_changes(run: RunFolder, config: ExperimentConfig, phase: str) -> None:
    """Writes a config that keeps what was made before, and a line of history; nothing if it is the run's."""
    if changes := differences(read_config(run), config):
        run.note_change({"phase": phase, "changed": changes})
        run.write_config(to_json(config), keeps_weights=True)


def differences(before: Any, after: Any, name: str = "") -> dict[str, list[Any]]:
    """By the dotted names of the fields of configs: the value before and the one after, where they differ."""
    if type(before) is not type(after) or not dataclasses.is_dataclass(before):
        return {} if before == after else {name: [before, after]}
    changes: dict[str, list[Any]] = {}
    for part in dataclasses.fields(before):
        inner = f"{name}.{part.name}" if name else part.name
        changes |= differences(getattr(before, part.name), getattr(after, part.name), inner)
    return changes
