"""Making datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metacontroller.recipes.collect import CollectConfig, collect


@dataclass(kw_only=True)
class Collect:
    """Play a policy of yours in a Gymnasium environment and keep the episodes as a dataset."""

    env: str
    """Gymnasium ID; module:ID where importing a module of yours registers it."""
    env_kwargs: str | None = None
    """Keywords with which it is made, as JSON, such as '{"is_slippery": false}'."""
    policy: str
    """Your function as package.module:function: it takes an observation and the environment, and returns an action."""
    episodes: int
    """Episodes to keep."""
    out: Path
    """Folder to make, or with --resume to continue in."""
    only_successes: bool = False
    """Keep episodes that succeed alone, as `evaluate` counts success."""
    success_return: float | None = None
    """The return that counts as success where the environment's info does not say; a positive reward at termination
    unless given."""
    max_steps: int | None = None
    """Steps after which an episode is truncated; the environment's own limit unless given."""
    seed: int = 0
    """From which each episode's seed derives; the episodes do not depend on --workers."""
    workers: int = 1
    """Processes that play."""
    resume: bool = False
    """Resume; what was played is not played again."""
    quiet: bool = False
    """Show no progress."""

    def __call__(self) -> None:
        config = CollectConfig(
            env=self.env,
            policy=self.policy,
            episodes=self.episodes,
            only_successes=self.only_successes,
            success_return=self.success_return,
            env_kwargs=self.env_kwargs,
            max_steps=self.max_steps,
            seed=self.seed,
        )
        done = collect(config, self.out, workers=self.workers, resume=self.resume, quiet=self.quiet)
        spread = "" if done["return_se"] is None else f" ± {done['return_se']:.2g}"
        reasons = {"lost": "lost to the environment", "unsolved": "without success", "surplus": "more than asked for"}
        left_out = "".join(f", {done[name]} {reason}" for name, reason in reasons.items() if done.get(name))
        print(
            f"{self.out}: {done['kept']} episodes kept of {done['played']} played{left_out}; {done['steps']} steps, "
            f"success {done['success']:.3f}, return {done['mean_return']:.4g}{spread}"
        )
