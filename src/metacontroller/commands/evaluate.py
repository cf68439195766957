"""What a run is worth in held-out episodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metacontroller.analysis.video import write_video
from metacontroller.commands.options import Measuring, device_name, seed_folders, telling_unkept
from metacontroller.errors import UserError
from metacontroller.phases.evaluate import Policy
from metacontroller.recipes.config import load_run
from metacontroller.recipes.measure import discovery_figures
from metacontroller.recipes.run_phase import tell_window
from metacontroller.report.tables import POLICIES, evaluation_name, evaluation_table
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.progress import announce
from metacontroller.training.seeding import stream_seed


@dataclass(kw_only=True)
class Evaluate(Measuring):
    """Measure a run, or every seed of a reproduction, in held-out episodes."""

    episodes: int | None = None
    """Episodes to play; as in the run's config unless given."""
    seed: int | None = None
    """Draws the episodes, never those of training; the run's own unless given."""
    task: str | None = None
    """A task of the run's world, written as that world writes it; the post-training task unless given."""
    policy: Policy = "internal-rl"
    """Who acts: raw actions before (base) or after (raw) raw-action RL, codes of the prior, of the trained policy or of
    the evolved one."""
    video: Path | None = None
    """Film some of the episodes too: a file that ends in .mp4 or .gif."""

    def __call__(self) -> None:
        runs = [RunFolder(path) for path in seed_folders(self.run)]
        if self.video is not None and len(runs) > 1:
            raise UserError(f"{self.run} holds {len(runs)} runs; name one of them to film it, as {runs[0].path}.")
        with telling_unkept(*runs):
            self.print_results([self.measure(run) for run in runs], evaluation_table)

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """Success of the chosen policy; where codes act, the gate's figures and what codes mean, too. The report reads
        what is measured on the post-training task."""
        loaded = load_run(run, device_name(self.device))
        seed = stream_seed(loaded.seed if self.seed is None else self.seed, "evaluate")
        task = None if self.task is None else loaded.domain.parse_task(self.task)
        episodes = loaded.settings.episodes if self.episodes is None else self.episodes
        if self.video is not None:
            write_video(loaded, self.policy, self.video, task=task, seed=seed)
        tell_window("evaluate", loaded.domain, loaded.device, quiet=self.json)
        announce(f"evaluate: {episodes} episodes of {POLICIES[self.policy]}", quiet=self.json)
        result = {"run": run.path.name, **loaded.evaluate(self.policy, task=task, episodes=episodes, seed=seed)}
        if lost := result.get("lost"):
            announce(
                f"evaluate: warning: {lost} of {episodes} episodes were lost to the environment and count as not "
                "solved; its returns are those until then."
            )
        if self.policy not in ("base", "raw"):
            announce("evaluate: the gate, and what codes mean", quiet=self.json or not loaded.subgoals)
            result |= discovery_figures(loaded, seed, max(episodes, loaded.settings.episodes))
        if task is None:
            run.write_analysis(evaluation_name(self.policy), result)
        return result


COMMANDS = {"evaluate": Evaluate}
