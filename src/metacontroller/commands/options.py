"""Options that several commands have, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from metacontroller import presets
from metacontroller.errors import UserError
from metacontroller.recipes.config import ExperimentConfig, read_config, with_seed
from metacontroller.storage.files import inside
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.tracking import Tracker, track_with

Device = Literal["auto", "cpu", "cuda"]


@dataclass(kw_only=True)
class Training:
    """Options of all commands that train."""

    resume: bool = False
    """Resume from the last checkpoint."""
    quiet: bool = False
    """Show no progress."""
    device: Device = "auto"
    """auto: a GPU if there is one."""


@dataclass(kw_only=True)
class Tracked(Training):
    """Options of commands that train and log scalars of their own."""

    track: Tracker | None = None
    """Send every logged scalar to a tracker too, by the extra track; nothing leaves this machine."""

    def tracked(self, run: RunFolder, workers: Processes) -> RunFolder:
        """The run folder, whose scalars the first process sends to the tracker asked for."""
        return track_with(run, self.track if workers.is_main else None, quiet=self.quiet)


def preset_config(preset: str | None = None) -> ExperimentConfig:
    """The config that the options of --config change; UserError for an unknown preset."""
    return presets.preset(presets.DEFAULT if preset is None else preset)


def chosen_config(config: ExperimentConfig, preset: str | None, run: RunFolder, resume: bool) -> ExperimentConfig:
    """The config asked for; when a run is resumed and nothing was said about it, the run's own."""
    if with_seed(config, config.seed) != config:
        raise UserError("the seeds of phases derive from the run's; change that with --seed or --seeds.")
    untouched = preset is None and config == preset_config()
    return read_config(run) if resume and untouched and (run.path / "config.json").exists() else config


def device_name(device: Device) -> str:
    """ "auto" as what is there; UserError for a GPU that is not."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no GPU here; give --device cpu or leave it out.")
    return device


def seed_folders(path: Path) -> list[Path]:
    """The runs in a reproduction's folder, or the folder of a run itself; UserError for a link that leads out."""
    seeds = sorted(path.glob("seed-*"), key=lambda part: (len(part.name), part.name))
    return [inside(path, seed) for seed in seeds] or [path]
