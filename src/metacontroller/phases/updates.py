"""The loop of phase 3, with gradients or without: play a batch of episodes, learn from it, log, checkpoint.

Metrics of every batch, means over its episodes: ``success``, as the environment reports it, ``return``, ``steps``,
``subgoals_done``, of codes ``decisions``, and ``lost`` where an environment can raise; ``episodes`` so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from metacontroller.phases.rollout import AbstractRollout, Rollout
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.divergence import NotFinite, check_module, diverged
from metacontroller.training.interruption import finishing, requested, stop
from metacontroller.training.optimizer import Learner
from metacontroller.training.progress import announce, track

SHOWN = ("success", "return", "best", "lost", "episodes")
"""Metrics that the progress shows, where there are some."""


@runtime_checkable
class Method(Protocol):
    """One way to learn from episodes."""

    @property
    def episodes(self) -> int:
        """Of an update, of all processes together."""
        ...

    def play(self) -> tuple[Rollout, Rollout]:
        """This process's new episodes, and all that it learns from: these, behind others that waited."""
        ...

    def learn(self, rollout: Any) -> dict[str, Tensor]:
        """One update from that; metrics. NotFinite for what is not finite."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the learner's own."""
        ...


def repeat(
    phase: str,
    updates: int,
    checkpoint_every: int,
    learner: Learner,
    method: Method,
    run: RunFolder,
    *,
    first: int,
    facts: Mapping[str, Any] | None = None,
    quiet: bool,
) -> None:
    """Updates ``first`` + 1 to ``updates`` of a phase that has begun. facts: for its checkpoints.

    DivergedError at the first return, loss, gradient or parameter that is not finite, see `training.divergence`.
    """
    workers = learner.processes
    quiet = quiet or not workers.is_main
    alone = run.locked() if workers.is_main else nullcontext()
    with alone, track(updates, phase, start=first, quiet=quiet) as progress, finishing():
        if workers.is_main:
            run.rewind_metrics(phase, first)
        for done in range(first + 1, updates + 1):
            played, rollout = method.play()
            metrics = {"episodes": done * method.episodes, **episode_means(played, workers)}
            if done == 1:
                question_success(phase, metrics["success"], quiet=quiet)
            try:
                metrics |= method.learn(rollout)
                check_module(learner.module)
                if workers.is_main:
                    run.log_metrics(phase, done, **metrics)
                shown = [name for name in SHOWN if name in metrics and (name != "lost" or metrics[name] > 0)]
                progress.update(done, **{name: metrics[name] for name in shown})
                stopping = workers.any(requested())
                if stopping or done % checkpoint_every == 0 or done == updates:
                    learner.save(run, phase, done, method.tensors(), facts)
            except NotFinite as error:
                batch = {name: value for name, value in vars(rollout).items() if value is not None}
                numbers = {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
                more = {"lr": learner.lr["optimizer"], "metrics": numbers, "writes": workers.is_main}
                raise diverged(run, phase, done, error, learner.module, batch, **more) from None
            if stopping:
                workers.wait()
                stop()
    workers.wait()


def question_success(phase: str, success: Tensor, *, quiet: bool) -> None:
    """Says so where the first batch, which was played before any update, has nothing but success."""
    if success > 1 - 1e-6:
        announce(
            f"{phase}: warning: success is 1.00 before any update, so there is nothing left to learn but a higher "
            "return; why go on? Stop here, or choose a harder task.",
            quiet,
        )


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
