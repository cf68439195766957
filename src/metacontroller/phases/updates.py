"""Updates of phase 3, with gradients or without: play a batch of episodes, learn from it.

Metrics of every batch, means over its episodes: ``success``, as the environment reports it, ``return``, ``steps``,
``subgoals_done``, of codes ``decisions``, and ``lost`` where an environment can raise; ``episodes`` so far.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metacontroller.phases.rollout import AbstractRollout, Rollout
from metacontroller.training.distributed import Processes
from metacontroller.training.divergence import check_module
from metacontroller.training.optimizer import Learner
from metacontroller.training.progress import announce
from metacontroller.training.repeat import Updates

SHOWN = ("success", "return", "best", "lost", "episodes")
"""Metrics that the progress shows, where there are some."""


@dataclass
class PlayedUpdates(Updates):
    """One way to learn from episodes. episodes: of an update, of all processes together. quiet: whether nothing is said
    where the first batch, which is played before any update, has nothing but success."""

    phase: str
    learner: Learner
    episodes: int
    quiet: bool

    @abstractmethod
    def play(self) -> tuple[Rollout, Rollout]:
        """This process's new episodes, and all that it learns from: these, behind others that waited."""

    @abstractmethod
    def learn(self, rollout: Any) -> dict[str, Tensor]:
        """One update from that; metrics. NotFinite for what is not finite."""

    def update(self, done: int) -> dict[str, Any]:
        played, rollout = self.play()
        self.batch = rollout.tensors
        self.metrics = {"episodes": done * self.episodes, **episode_means(played, self.learner.processes)}
        if done == 1 and self.metrics["success"] > 1 - 1e-6:
            announce(
                f"{self.phase}: warning: success is 1.00 before any update, so there is nothing left to learn but a "
                "higher return; why go on? Stop here, or choose a harder task.",
                self.quiet or not self.learner.processes.is_main,
            )
        self.metrics |= self.learn(rollout)
        check_module(self.learner.module)
        return self.metrics

    def shown(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {name: metrics[name] for name in SHOWN if name in metrics and (name != "lost" or metrics[name] > 0)}


def episode_means(rollout: Rollout, workers: Processes) -> dict[str, Tensor]:
    """Means over the batch's episodes of all processes."""
    columns = {"success": rollout.success, "return": rollout.returns, "steps": rollout.steps}
    columns["subgoals_done"] = rollout.subgoals_done
    if isinstance(rollout, AbstractRollout):
        columns["decisions"] = rollout.lengths
    if rollout.lost is not None:
        columns["lost"] = rollout.lost
    means = {name: column.float().mean() / workers.count for name, column in columns.items()}
    workers.all_reduce(list(means.values()))
    return means
