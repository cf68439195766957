"""The training loop of pretraining and discovery, which can resume exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from metacontroller.data.batching import EpisodeStream, Generate
from metacontroller.data.trajectories import Ratio, Trajectories
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.divergence import NotFinite, diverged
from metacontroller.training.interruption import finishing, requested, stop
from metacontroller.training.optimizer import Learner, OptimizerConfig
from metacontroller.training.progress import announce, track
from metacontroller.training.seeding import noise_generator
from metacontroller.training.validation import Validation

Metrics = Mapping[str, Tensor | Ratio]
"""Of a batch, or of a process's rows of it: scalars are means over real steps. A mean over anything else is a ratio, of
which the sums of a log interval and of all processes are added before they are divided."""


class _Means:
    """Running means of metrics."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}  # of ratios; of all other metrics it is the number of steps
        self.count = 0

    def add(self, metrics: Metrics, share: Tensor | float = 1.0) -> None:
        """Adds one step's, without synchronizing with the device; their order is this step's, also after ``restore``.

        share: of the batch's real steps, those of this process.
        """
        sums = {}
        for name, value in metrics.items():
            if isinstance(value, Ratio):
                self.counts[name] = self.counts[name] + value.count if name in self.counts else value.count
            total = (value.total if isinstance(value, Ratio) else share * value).detach()
            sums[name] = self.sums.pop(name) + total if name in self.sums else total
        self.sums = {**sums, **self.sums}
        self.count += 1

    def tensors(self, workers: Processes) -> dict[str, Tensor]:
        """What ``restore`` needs, of all processes together; nothing right after ``take``."""
        tensors = {f"means.sums.{name}": value.clone() for name, value in self.sums.items()}
        tensors |= {f"means.counts.{name}": value.clone() for name, value in self.counts.items()}
        workers.all_reduce(list(tensors.values()))
        return tensors | ({"means.count": torch.tensor(self.count)} if tensors else {})

    def restore(self, tensors: Mapping[str, Tensor], workers: Processes, device: torch.device) -> None:
        """Goes on from ``tensors``, whose sums the first process alone carries."""
        for start, held in (("means.sums.", self.sums), ("means.counts.", self.counts)):
            for name, value in tensors.items():
                if name.startswith(start):
                    held[name.removeprefix(start)] = value.to(device) * int(workers.is_main)
                    self.count = int(tensors["means.count"])

    def take(self, workers: Processes) -> dict[str, float]:
        """Returns the means over the steps since the last call, of all processes together, and resets them."""
        workers.all_reduce([*self.sums.values(), *self.counts.values()])
        counts = {name: max(1.0, float(count)) for name, count in self.counts.items()}
        means = {name: float(total) / counts.get(name, self.count) for name, total in self.sums.items()}
        self.sums, self.counts, self.count = {}, {}, 0
        return means


PARTED = (
    "the model knows the episodes that it trained on better than others; collect more episodes, or train for fewer "
    "updates, with more weight decay, or a smaller model."
)

BatchExtras = dict[str, Tensor]
"""Tensors (b, ...) that a loss needs in addition to its batch: noise, augmented states."""

SampleExtras = Callable[[Trajectories, int, torch.Generator], BatchExtras]
LossFunction = Callable[[Trajectories, int, BatchExtras], tuple[Tensor, Metrics]]


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
    matrices: Sequence[nn.Parameter] = (),
    muon_lr: float = 0.0,
    sample_extras: SampleExtras | None = None,
    validation: Generate | None = None,
    after: Callable[[int], None] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> None:
    """Trains ``parameters`` of ``module`` in place, on episodes from ``generate``.

    loss_function(batch, step, extras) -> the loss, a mean over real steps, and the metrics to log (`Metrics`), whose
    means over the log interval are written. sample_extras(batch, step, generator) -> ``extras`` of a batch.
    after(done): called after every update with the number of updates so far. seed: of the episodes and, in a separate
    stream, of ``sample_extras``.
    validation: episodes that are not trained on; their metric ``action_loss`` is logged as ``val_action_loss``, on one
    batch each time, and set beside that in training at the end, see `training.validation`.
    matrices, muon_lr: as of `Learner`. Several processes share each batch, see `training.distributed`.

    Checkpoints go to ``run`` under the phase's name, and one more where a signal asks to stop
    (`training.interruption`). With ``resume``, training continues from the last one, bit for bit as if it had not
    stopped, with as many processes and threads as before. A finished phase is not trained again. UserError if ``run``
    holds a checkpoint of the phase and ``resume`` is false; DivergedError at the first loss, gradient or parameter that
    is not finite, see `training.divergence`.
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
        matrices=matrices,
        muon_lr=muon_lr,
    )
    run.begin(phase, resume=resume)
    first, tensors = learner.restore(run, phase, config.steps) if resume else (0, {})
    if 0 < first < config.steps:
        stream.restore(tensors)
    workers = learner.processes
    module.train()
    held_out = None
    if validation is not None and first < config.steps:

        def action_loss(batch: Trajectories, generator: torch.Generator) -> Tensor:
            extras = sample_extras(batch, done - 1, generator) if sample_extras else {}
            return _scalar(loss_function(batch, done - 1, extras)[1]["action_loss"])

        held_out = Validation(validation, config.batch_size, seed, module, action_loss)
    means = _Means()
    if first < config.steps:
        means.restore(tensors, workers, device)
    alone = run.locked() if workers.is_main else nullcontext()
    with alone, track(config.steps, phase, start=first, quiet=quiet or not workers.is_main) as progress, finishing():
        if workers.is_main:
            run.rewind_metrics(phase, first)
        for step in range(first, config.steps):
            learner.scale_lr(config.share_of_lr(step))
            batch = stream.next().to(device)
            extras = sample_extras(batch, step, learner.generator) if sample_extras else {}
            batch, extras, share = _own_share(batch, extras, workers)
            loss, metrics = loss_function(batch, step, extras)
            done, last = step + 1, step + 1 == config.steps
            try:
                (share * loss).backward()
                learner.optimizer_step(share * loss)
                means.add({"loss": loss, **metrics}, share)
                if last or done % config.log_every == 0:
                    measured = means.take(workers)
                    if held_out is not None:
                        measured["val_action_loss"] = held_out.loss()
                    if workers.is_main:
                        run.log_metrics(phase, done, **measured)
                    progress.update(done, **measured)
                if after is not None:
                    after(done)
                stopping = workers.any(requested())
                if last or stopping or done % config.checkpoint_every == 0:
                    learner.save(run, phase, done, {**stream.tensors(), **means.tensors(workers)})
            except NotFinite as found:
                tensors = {**_tensors_of(batch), **extras}
                facts = {
                    "lr": config.lr_at(step),
                    "metrics": {name: float(_scalar(value)) for name, value in metrics.items()},
                }
                raise diverged(run, phase, done, found, module, tensors, writes=workers.is_main, **facts) from None
            if stopping:
                workers.wait()
                stop()
    module.eval()
    if held_out is not None:
        line, parted = held_out.compared(generate)
        if workers.is_main:
            announce(f"{phase}: {line}", quiet)
            if parted:
                announce(f"{phase}: warning: {PARTED}", quiet)
    workers.wait()


def _scalar(metric: Tensor | Ratio) -> Tensor:
    return (metric.mean if isinstance(metric, Ratio) else metric).detach()


def _tensors_of(batch: Trajectories) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if value is not None}


def _own_share(
    batch: Trajectories, extras: BatchExtras, workers: Processes
) -> tuple[Trajectories, BatchExtras, Tensor | float]:
    """This process's rows of a batch and of its extras, and their share of the batch's real steps.

    The rows keep the batch's T, so that the extras fit them whichever of their axes are time. Episodes of a batch are
    of similar length: cutting to the longest of the rows would save next to nothing.
    """
    rows = workers.rows(batch.batch)
    if rows is None:
        return batch, extras, 1.0
    rows = rows.to(batch.lengths.device)
    own = replace(batch, **{name: value[rows] for name, value in _tensors_of(batch).items()})
    own_extras = {name: value[rows] for name, value in extras.items()}
    return own, own_extras, own.lengths.sum() / batch.lengths.sum()
