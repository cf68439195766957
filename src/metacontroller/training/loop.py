"""Training of pretraining and discovery, which can resume exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from metacontroller.data.batching import EpisodeStream, Generate
from metacontroller.data.trajectories import Ratio, Trajectories
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.optimizer import Learner, OptimizerConfig
from metacontroller.training.progress import announce
from metacontroller.training.repeat import Updates, repeat_updates
from metacontroller.training.seeding import noise_generator
from metacontroller.training.validation import Validation

Metrics = Mapping[str, Tensor | Ratio]
"""Of a batch, or of a process's rows of it: scalars are means over real steps. A mean over anything else is a ratio, of
which the sums of a log interval and of all processes are added before they are divided."""

BatchExtras = dict[str, Tensor]
"""Tensors (b, ...) that a loss needs in addition to its batch: noise, augmented states."""

SampleExtras = Callable[[Trajectories, int, torch.Generator], BatchExtras]
LossFunction = Callable[[Trajectories, int, BatchExtras], tuple[Tensor, Metrics]]

PARTED = (
    "the model knows the episodes that it trained on better than others; collect more episodes, or train for fewer "
    "updates, with more weight decay, or a smaller model."
)


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
    stream, of ``sample_extras``. matrices, muon_lr: as of `Learner`.
    validation: episodes that are not trained on; their metric ``action_loss`` is logged as ``val_action_loss``, on one
    batch each time, and set beside that in training at the end, see `training.validation`.

    Checkpoints go to ``run`` under the phase's name. With ``resume``, training continues from the last one, bit for bit
    as if it had not stopped, with as many processes (`training.distributed`) and threads as before. A finished phase is
    not trained again. UserError if ``run`` holds a checkpoint of the phase and ``resume`` is false; for other endings
    see `repeat_updates`.
    """
    generator = noise_generator(seed, parameters[0].device)
    learner = Learner(
        module,
        parameters,
        generator,
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        matrices=matrices,
        muon_lr=muon_lr,
    )
    stream = EpisodeStream(generate, config.batch_size, seed, device=parameters[0].device)
    updates = _Supervised(config, learner, stream, loss_function, sample_extras or (lambda *_: {}), after)
    run.begin(phase, resume=resume)
    first, tensors = learner.restore(run, phase, config.steps) if resume else (0, {})
    module.train()
    if first < config.steps:
        updates.restore(first, tensors)
        if validation is not None:
            updates.validation = Validation(validation, config.batch_size, seed, module, updates.action_loss)
    repeat_updates(phase, updates, first, config.steps, config.checkpoint_every, run, quiet=quiet)
    module.eval()
    if updates.validation is not None:
        line, parted = updates.validation.compared(generate)
        if learner.processes.is_main:
            announce(f"{phase}: {line}", quiet)
            announce(f"{phase}: warning: {PARTED}", quiet or not parted)
    learner.processes.wait()


@dataclass
class _Supervised(Updates):
    """Updates of `train`."""

    config: OptimizerConfig
    learner: Learner
    stream: EpisodeStream
    loss_function: LossFunction
    sample_extras: SampleExtras
    after: Callable[[int], None] | None
    validation: Validation | None = None

    def __post_init__(self) -> None:
        self.device = self.learner.parameters[0].device
        self.means, self.step = _Means(), 0

    def restore(self, done: int, tensors: dict[str, Tensor]) -> None:
        """Goes on from a checkpoint's tensors."""
        if done:
            self.stream.restore(tensors)
        self.means.restore(tensors, self.learner.processes, self.device)

    def update(self, done: int) -> dict[str, float]:
        config, learner, self.step = self.config, self.learner, done - 1
        learner.scale_lr(config.share_of_lr(self.step))
        batch = self.stream.next().to(self.device)
        extras = self.sample_extras(batch, self.step, learner.generator)
        batch, extras, share = _share(batch, extras, learner.processes)
        loss, self.metrics = self.loss_function(batch, self.step, extras)
        self.batch = {**_tensors_of(batch), **extras}
        (share * loss).backward()
        learner.optimizer_step(share * loss)
        self.means.add({"loss": loss, **self.metrics}, share)
        measured: dict[str, float] = {}
        if done == config.steps or done % config.log_every == 0:
            measured = self.means.take(learner.processes)
            if self.validation is not None:
                measured["val_action_loss"] = self.validation.loss()
        if self.after is not None:
            self.after(done)
        return measured

    def tensors(self) -> dict[str, Tensor]:
        return {**self.stream.tensors(), **self.means.tensors(self.learner.processes)}

    def action_loss(self, batch: Trajectories, generator: torch.Generator) -> Tensor:
        """Of a batch, a scalar, as at the last update."""
        extras = self.sample_extras(batch, self.step, generator)
        value = self.loss_function(batch, self.step, extras)[1]["action_loss"]
        return (value.mean if isinstance(value, Ratio) else value).detach()


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
        for start, sums in (("means.sums.", self.sums), ("means.counts.", self.counts)):
            for name, value in tensors.items():
                if name.startswith(start):
                    sums[name.removeprefix(start)] = value.to(device) * int(workers.is_main)
                    self.count = int(tensors["means.count"])

    def take(self, workers: Processes) -> dict[str, float]:
        """Returns the means over the steps since the last call, of all processes together, and resets them."""
        workers.all_reduce([*self.sums.values(), *self.counts.values()])
        counts = {name: max(1.0, float(count)) for name, count in self.counts.items()}
        means = {name: float(total) / counts.get(name, self.count) for name, total in self.sums.items()}
        self.sums, self.counts, self.count = {}, {}, 0
        return means


def _tensors_of(batch: Trajectories) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if value is not None}


def _share(
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
    part = replace(batch, **{name: value[rows] for name, value in _tensors_of(batch).items()})
    return part, {name: value[rows] for name, value in extras.items()}, part.lengths.sum() / batch.lengths.sum()
