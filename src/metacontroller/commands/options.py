"""Options that several commands have, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from metacontroller.errors import UserError
from metacontroller.phases.reproduce import read_config
from metacontroller.presets import PRESETS, GridworldConfig, laptop
from metacontroller.presets.gridworld import with_seed
from metacontroller.run_folder import RunFolder

Preset = Literal["debug", "laptop", "quick", "paper"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(kw_only=True)
class Training:
    """Options of all commands that train."""

    resume: bool = False
    """Go on from the last checkpoint."""
    quiet: bool = False
    """Show no progress."""
    device: Device = "auto"
    """auto: a GPU if there is one."""


def preset_config(preset: str | None) -> GridworldConfig:
    """The config that the options of --config change; that of an unknown preset is never used."""
    return PRESETS.get(preset or "laptop", laptop)()


def chosen_config(config: GridworldConfig, preset: str | None, run: RunFolder, resume: bool) -> GridworldConfig:
    """The config asked for; when a run is resumed and nothing was said about it, the run's own."""
    if with_seed(config, config.seed) != config:
        raise UserError("the seeds of phases derive from the run's; change that with --seed or --seeds.")
    untouched = preset is None and config == laptop()
    return read_config(run) if resume and untouched and (run.path / "config.json").exists() else config


def device_name(device: Device) -> str:
    """ "auto" as what is there; UserError for a GPU that is not."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU here; give --device cpu or leave it out.")
    return device


def seed_folders(path: Path) -> list[Path]:
    """The runs in a reproduction's folder, or the folder of a run itself."""
    return sorted(path.glob("seed-*"), key=lambda part: (len(part.name), part.name)) or [path]
