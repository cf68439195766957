"""Making datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from metacontroller.recipes.collect import CollectConfig, collect


@dataclass(kw_only=True)
class Collect:
    """Play a policy of yours in a Gymnasium environment and keep the episodes as a dataset."""

    config: OmitArgPrefixes[CollectConfig]
    """What to play, and which episodes to keep."""
    out: Path
    """Folder to make, or with --resume to continue in."""
    workers: int = 1
    """Processes that play."""
    resume: bool = False
    """Resume; what was played is not played again."""
    quiet: bool = False
    """Show no progress."""

    def __call__(self) -> None:
        done = collect(self.config, self.out, workers=self.workers, resume=self.resume, quiet=self.quiet)
        spread = "" if done["return_se"] is None else f" ± {done['return_se']:.2g}"
        reasons = {"lost": "lost to the environment", "unsolved": "without success", "surplus": "more than asked for"}
        left_out = "".join(f", {done[name]} {reason}" for name, reason in reasons.items() if done.get(name))
        print(
            f"{self.out}: {done['kept']} episodes kept of {done['played']} played{left_out}; {done['steps']} steps, "
            f"success {done['success']:.3f}, return {done['mean_return']:.4g}{spread}"
        )


COMMANDS = {"collect": Collect}
