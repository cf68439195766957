"""The loop of every phase: update, log, checkpoint; it ends early at a signal or at a number that is not finite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from metacontroller.data.trajectories import Ratio
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.divergence import NotFinite, diverged
from metacontroller.training.interruption import finishing, requested, stop
from metacontroller.training.optimizer import Learner
from metacontroller.training.progress import track


class Updates(ABC):
    """What a phase does, update by update.

    batch: what the last update learned from, tensors by name; metrics: of it, scalars. Both are for the files that a
    divergence leaves. facts: JSON values for checkpoints.
    """

    learner: Learner
    batch: Mapping[str, Tensor]
    metrics: Mapping[str, Any]
    facts: Mapping[str, Any] | None = None

    @abstractmethod
    def update(self, done: int) -> Mapping[str, Any]:
        """Update number ``done``, counted from 1; the metrics to log, if it is time. NotFinite for what is not."""

    def shown(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of the logged metrics that the progress shows."""
        return metrics

    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds besides the learner's own; asked for in all processes."""
        return {}


def repeat_updates(
    phase: str, updates: Updates, first: int, count: int, checkpoint_every: int, run: RunFolder, *, quiet: bool
) -> None:
    """Makes the updates after ``first``, up to ``count``, of a phase that has begun; the first process locks the run.

    DivergedError at the first number that is not finite, see `training.divergence`; `Interrupted`, after a checkpoint,
    where a signal asks to stop, see `training.interruption`.
    """
    learner, workers = updates.learner, updates.learner.processes
    alone = run.locked() if workers.is_main else nullcontext()
    with alone, track(count, phase, start=first, quiet=quiet or not workers.is_main) as progress, finishing():
        if workers.is_main:
            run.rewind_metrics(phase, first)
        for done in range(first + 1, count + 1):
            try:
                if metrics := updates.update(done):
                    if workers.is_main:
                        run.log_metrics(phase, done, **metrics)
                    progress.update(done, **updates.shown(metrics))
                stopping = workers.any(requested())
                if stopping or done == count or done % checkpoint_every == 0:
                    learner.save(run, phase, done, updates.tensors(), updates.facts)
            except NotFinite as error:
                facts = {"lr": learner.lr_now, "metrics": {name: _number(one) for name, one in updates.metrics.items()}}
                writes = workers.is_main
                raise diverged(run, phase, done, error, learner.module, updates.batch, writes=writes, **facts) from None
            if stopping:
                workers.wait()
                stop()
    workers.wait()


def _number(metric: Any) -> float:
    return float((metric.mean if isinstance(metric, Ratio) else torch.as_tensor(metric)).detach())
