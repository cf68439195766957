"""What a run is worth on held-out layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from metacontroller.commands.options import Device, device_name, seed_folders
from metacontroller.commands.output import evaluation_table, print_results
from metacontroller.envs.tasks import parse_task
from metacontroller.phases.evaluate import Policy
from metacontroller.phases.reproduce import discovery_figures, evaluate_run, load_run
from metacontroller.presets.gridworld import stream_seed
from metacontroller.run_folder import RunFolder


@dataclass(kw_only=True)
class Evaluate:
    """Measure a run, or every seed of a reproduction, on new layouts."""

    run: Positional[Path]
    """Folder of a run or of a reproduction."""
    episodes: int | None = None
    """Episodes to play; as in the run's config unless given."""
    seed: int | None = None
    """Draws the layouts, never those of training; the run's own unless given."""
    task: str | None = None
    """Colors to visit in order, such as 0-1-2-3; the run's post-training task unless given."""
    policy: Policy = "internal-rl"
    """Who acts: raw actions before (base) or after (raw) raw-action RL, codes of the prior or of the trained policy."""
    json: bool = False
    """Print JSON: an object for a run, a list for a reproduction."""
    device: Device = "auto"
    """auto: a GPU if there is one."""

    def __call__(self) -> None:
        results = [self.measure(RunFolder(path)) for path in seed_folders(self.run)]
        print_results(results, self.run, evaluation_table, as_json=self.json)

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """Success of the chosen policy; where codes act, the gate's figures and what codes mean, too."""
        loaded = load_run(run, device_name(self.device))
        seed = stream_seed(loaded.seed if self.seed is None else self.seed, "evaluate")
        task = None if self.task is None else parse_task(self.task)
        settings = loaded.config.evaluate
        episodes = settings.episodes if self.episodes is None else self.episodes
        result = {"run": run.path.name, **evaluate_run(loaded, self.policy, task=task, episodes=episodes, seed=seed)}
        if self.policy in ("base", "raw"):
            return result
        return {**result, **discovery_figures(loaded, seed, max(episodes, settings.episodes))}
