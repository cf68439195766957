"""What several commands share: options, and results on standard output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from metacontroller import presets
from metacontroller.errors import UserError
from metacontroller.recipes.config import ExperimentConfig, read_config, with_seed
from metacontroller.storage.files import inside
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.tracking import Tracker, track_with

Device = Literal["auto", "cpu", "cuda"]


def preset_config(preset: str | None = None) -> ExperimentConfig:
    """The config that the options of --config change; UserError for an unknown preset."""
    return presets.preset(presets.DEFAULT if preset is None else preset)


@dataclass(kw_only=True)
class OnDevice:
    """Options of all commands that run models."""

    device: Device = "auto"
    """auto: a GPU if there is one."""


@dataclass(kw_only=True)
class Training(OnDevice):
    """Options of all commands that train."""

    resume: bool = False
    """Resume from the last checkpoint."""
    quiet: bool = False
    """Show no progress."""


@dataclass(kw_only=True)
class Tracked(Training):
    """Options of commands that train and log scalars of their own."""

    track: Tracker | None = None
    """Send every logged scalar to a tracker too, by the extra track; nothing leaves this machine."""

    def tracked(self, run: RunFolder, workers: Processes) -> RunFolder:
        """The run folder, whose scalars the first process sends to the tracker asked for."""
        return track_with(run, self.track if workers.is_main else None, quiet=self.quiet)


@dataclass(kw_only=True)
class FromPreset:
    """Options of commands whose config starts from a preset."""

    preset: str | None = None
    """Where the config starts from: laptop unless given, or a function of yours as package.module:function."""
    config: ExperimentConfig = field(default_factory=preset_config)
    """Change any value of the preset."""

    @classmethod
    def defaults(cls, words: Sequence[str]) -> Any:
        """The defaults of all options on a command line: its --preset decides those of --config."""
        return defaults_of(cls, config=preset_config(early_option(words, "preset")))

    def chosen(self, config: ExperimentConfig, run: RunFolder, *, resume: bool) -> ExperimentConfig:
        """The config asked for; when a run is resumed and nothing was said about it, the run's own."""
        if with_seed(config, config.seed) != config:
            raise UserError("the seeds of phases derive from the run's; change that with --seed or --seeds.")
        untouched = self.preset is None and config == preset_config()
        return read_config(run) if resume and untouched and (run.path / "config.json").exists() else config


@dataclass(kw_only=True)
class Measuring(OnDevice):
    """Options of commands that measure a run, or every seed of a reproduction."""

    run: Positional[Path]
    """Folder of a run or of a reproduction."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""

    def print_results(self, results: list[dict[str, Any]], table: Callable[[list[dict[str, Any]]], Table]) -> None:
        """Those of each run, as a table or as JSON."""
        if self.json:
            print(json.dumps(results[0] if seed_folders(self.run) == [self.run] else results, indent=2))
        else:
            Console().print(table(results))


def early_option(words: Sequence[str], name: str) -> str | None:
    """The value of an option that decides the defaults of others; None if it has none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?")
    return getattr(parser.parse_known_args(words)[0], name)


def defaults_of(kind: type[Any], **known: Any) -> Any:
    """A command with these options and the defaults of all others; those without one are still to be given."""
    needed = [part.name for part in fields(kind) if part.default is MISSING and part.default_factory is MISSING]
    return kind(**dict.fromkeys(needed, tyro.MISSING) | known)


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


@contextmanager
def telling_unkept(*folders: RunFolder) -> Iterator[None]:
    """Context in which a folder that may only be read ends nothing: what could not be kept there is told at the end,
    see `RunFolder.keeping`."""
    for folder in folders:
        folder.unkept = []
    yield
    for folder in folders:
        if folder.unkept:
            names = ", ".join(folder.unkept)
            print(f"metacontroller: {folder.path} may only be read: {names} could not be kept.", file=sys.stderr)
