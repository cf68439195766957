"""Analyses of runs: what layers know, how they can be steered, what codes and the gate do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tyro.conf import Positional

from metacontroller.analysis.figures import draw_layers, require_matplotlib
from metacontroller.analysis.runs import gate_run, inject_run, probe_run, steer_run
from metacontroller.commands.options import Device, device_name, seed_folders
from metacontroller.commands.output import evaluation_table, gate_table, layers_table, print_results
from metacontroller.errors import UserError
from metacontroller.run_folder import RunFolder


@dataclass(kw_only=True)
class LayerAnalysis:
    """Options of analyses that train something small at every layer of a run's base model."""

    run: Positional[Path]
    """Folder of a run or of a reproduction."""
    steps: int = 1000
    """Updates."""
    batch_size: int = 128
    """Episodes an update."""
    lr: float = 3e-3
    """Learning rate."""
    episodes: int = 2048
    """New episodes to judge by."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""
    quiet: bool = False
    """Show no progress."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        for option in ("steps", "batch_size", "episodes"):
            if getattr(self, option) < 1:
                raise UserError(f"{option} is {getattr(self, option)}; expected at least 1.")
        if self.lr <= 0:
            raise UserError(f"lr is {self.lr}; expected a number above 0.")
        require_matplotlib()
        runs = [RunFolder(path) for path in seed_folders(self.run)]
        options = {name: getattr(self, name) for name in ("steps", "batch_size", "lr", "episodes", "quiet")}
        results = [
            {"run": run.path.name, **self.analysis(run, device=device_name(self.device), **options)} for run in runs
        ]
        draw_layers(RunFolder(self.run), runs)
        print_results(results, self.run, layers_table, as_json=self.json)

    analysis: ClassVar[Callable[..., dict[str, Any]]]


@dataclass(kw_only=True)
class Probe(LayerAnalysis):
    """Linear probes of the subgoal at every layer of the base model and of its snapshots (Fig. 3, A1).

    They are kept in probes.safetensors.
    """

    analysis = staticmethod(probe_run)


@dataclass(kw_only=True)
class Steer(LayerAnalysis):
    """Supervised controllers with true labels at every layer, chained on the post-training task (Fig. 4)."""

    analysis = staticmethod(steer_run)


@dataclass(kw_only=True)
class Inject:
    """Force each subgoal's code in the middle of episodes, and see where they go (Fig. A4)."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions, or of a reproduction."""
    walks: int = 1024
    """For each subgoal, free and forced."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        if self.walks < 1:
            raise UserError(f"walks is {self.walks}; expected at least 1.")
        results = [
            {"run": path.name, **inject_run(RunFolder(path), walks=self.walks, device=device_name(self.device))}
            for path in seed_folders(self.run)
        ]
        print_results(results, self.run, evaluation_table, as_json=self.json)


@dataclass(kw_only=True)
class Gate:
    """The gate against true subgoal changes at tolerances 0, 1, 2, and its histograms (Fig. 6, A3)."""

    run: Positional[Path]
    """Folder of a run with discovered abstract actions, or of a reproduction."""
    episodes: int = 2048
    """New episodes to judge by."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        if self.episodes < 1:
            raise UserError(f"episodes is {self.episodes}; expected at least 1.")
        results = [
            {"run": path.name, **gate_run(RunFolder(path), episodes=self.episodes, device=device_name(self.device))}
            for path in seed_folders(self.run)
        ]
        print_results(results, self.run, gate_table, as_json=self.json)
