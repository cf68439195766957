"""What the phases share: the loop of pretraining and discovery, streams of episodes, AdamW steps, exact resumption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from metacontroller.data.batching import EpisodeStream, Generate
from metacontroller.data.trajectories import Trajectories
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.optimizer import Learner, OptimizerConfig
from metacontroller.training.progress import track
from metacontroller.training.seeding import noise_generator


class _Means:
    """Means of metrics since the last time they were taken."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds one step's scalars; nothing here waits for the device."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()
        self.count += 1

    def take(self, workers: Processes) -> dict[str, float]:
        """The means, added up over the processes; they start afresh."""
        workers.all_reduce(list(self.sums.values()))
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


Drawn = dict[str, Tensor]
"""What a loss needs beside its batch, (b, ...) each: random numbers, views."""

Draw = Callable[[Trajectories, torch.Generator], Drawn]
LossFunction = Callable[[Trajectories, int, Drawn], tuple[Tensor, dict[str, Tensor]]]


def train(
    phase: str,
    config: OptimizerConfig,
    module: nn.Module,
    parameters: list[nn.Parameter],
    generate: Generate,
    loss_function: LossFunction,
    run: RunFolder,
    *,
    seed: int,
    draw: Draw | None = None,
    after: Callable[[int], None] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> None:
    """Trains ``parameters`` of ``module`` in place, on episodes from ``generate``.

    ``loss_function(batch, step, drawn)`` returns the loss, a mean over real steps, and the metrics to log, of which
    means over the log interval are kept. ``draw(batch, generator)`` makes ``drawn`` for each batch.
    ``after(done)`` is called after every update, ``done`` of them so far. seed: of the episodes and, apart, of what is
    drawn. Several processes share each batch, see `phases.parallel`.
    Checkpoints go to ``run`` under the phase's name; with ``resume`` training goes on from the last one, bit for bit as
    if it had never stopped. Only the first means logged after a checkpoint between two log points differ: they cover
    the steps since the checkpoint. A finished phase is not trained again; without ``resume`` ValueError if ``run``
    holds a checkpoint of the phase.
    """
    device = parameters[0].device
    stream = EpisodeStream(generate, config.batch_size, seed, device=device)
    learner = Learner(
        module,
        parameters,
        noise_generator(seed, device),
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    run.begin(phase, resume=resume)
    first, tensors = learner.restore(run, phase) if resume else (0, {})
    if 0 < first < config.steps:
        stream.restore(tensors)
    workers = learner.processes
    if workers.is_main:
        run.rewind_metrics(phase, first)
    module.train()
    means = _Means()
    with track(config.steps, phase, start=first, quiet=quiet or not workers.is_main) as progress:
        for step in range(first, config.steps):
            for group in learner.optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            batch = stream.next().to(device)
            drawn = draw(batch, learner.generator) if draw else {}
            batch, drawn, share = _own_share(batch, drawn, workers)
            loss, metrics = loss_function(batch, step, drawn)
            (share * loss).backward()
            learner.optimizer_step()
            means.add({name: share * value for name, value in {"loss": loss, **metrics}.items()})
            done, last = step + 1, step + 1 == config.steps
            if last or done % config.log_every == 0:
                measured = means.take(workers)
                if workers.is_main:
                    run.log_metrics(phase, done, **measured)
                progress.update(done, **measured)
            if after is not None:
                after(done)
            if last or done % config.checkpoint_every == 0:
                learner.save(run, phase, done, stream.tensors())
    module.eval()
    workers.wait()


def _own_share(batch: Trajectories, drawn: Drawn, workers: Processes) -> tuple[Trajectories, Drawn, Tensor | float]:
    """This process's rows of a batch and of what was drawn for it, and their share of the batch's real steps.

    The rows keep the batch's T, so that what was drawn fits them whichever of its axes are time. Episodes of a batch
    are of similar length: cutting to the longest of the rows would save next to nothing.
    """
    rows = workers.rows(batch.batch)
    if rows is None:
        return batch, drawn, 1.0
    rows = rows.to(batch.lengths.device)
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    part = replace(batch, **{name: value[rows] for name, value in values.items() if value is not None})
    own = {name: value[rows] for name, value in drawn.items()}
    return part, own, part.lengths.sum() / batch.lengths.sum()
