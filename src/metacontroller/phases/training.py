"""What the phases share: the loop of pretraining and discovery, streams of episodes, AdamW steps, exact resumption."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from metacontroller.data.trajectories import Trajectories, length_sorted_batches
from metacontroller.errors import UserError
from metacontroller.phases.parallel import Processes, processes
from metacontroller.progress import track
from metacontroller.run_folder import (
    RunFolder,
    generator_tensor,
    load_generator,
    load_module,
    load_optimizer,
    module_tensors,
    optimizer_meta,
    optimizer_tensors,
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with betas 0.9 and 0.999 (paper, table A3 and following) and how long to train."""

    steps: int
    """Updates."""
    batch_size: int
    """Episodes an update."""
    lr: float
    """Learning rate."""
    weight_decay: float = 0.03
    """Decoupled weight decay of AdamW."""
    decay_steps: int = 0
    """Updates at the end over which the learning rate falls linearly to zero; 0 keeps it constant (the paper)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm (the paper is silent)."""
    log_every: int = 50
    """Updates from one line of metrics to the next."""
    checkpoint_every: int = 500
    """Updates from one checkpoint to the next."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.lr <= 0:
            raise UserError(f"lr is {self.lr}; expected a number above 0.")
        if not 0 <= self.decay_steps <= self.steps:
            raise UserError(f"decay_steps is {self.decay_steps}; expected 0..{self.steps}, the number of steps.")

    def lr_at(self, step: int) -> float:
        """Learning rate of update number ``step``, counted from 0."""
        left = self.steps - step
        return self.lr * min(1.0, left / self.decay_steps) if self.decay_steps else self.lr


def risen(step: int, between: tuple[int, int]) -> float:
    """How much of a linear rise between two steps is done at update number ``step``, counted from 0: 0 to 1."""
    start, end = between
    return 1.0 if step >= end else max(0.0, (step - start) / (end - start))


Generate = Callable[[int, torch.Generator], Trajectories]
"""A source of behaviour: ``generate(n, generator)`` returns n fresh (or drawn) episodes."""


class EpisodeStream:
    """Endless length-sorted batches from a source, in windows; its position can be saved and restored exactly.

    The source is given random numbers of ``device`` and so can make its episodes there.
    """

    def __init__(
        self, generate: Generate, batch_size: int, seed: int, window: int = 8, device: torch.device | str = "cpu"
    ) -> None:
        self.generate, self.batch_size, self.window = generate, batch_size, window
        self.generator = torch.Generator(device).manual_seed(seed)
        self.window_start = self.generator.get_state()
        self.used = window
        self.batches: list[Trajectories] = []

    def next(self) -> Trajectories:
        """The next batch."""
        if self.used == self.window:
            self._open_window()
        self.used += 1
        return self.batches[self.used - 1]

    def tensors(self) -> dict[str, Tensor]:
        """What ``restore`` needs."""
        return {"stream.window": self.window_start.clone(), "stream.used": torch.tensor(self.used)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on exactly where ``tensors`` were taken."""
        self.generator.set_state(tensors["stream.window"].cpu())
        self._open_window()
        self.used = int(tensors["stream.used"])

    def _open_window(self) -> None:
        self.window_start = self.generator.get_state()
        episodes = self.generate(self.window * self.batch_size, self.generator)
        self.batches = list(length_sorted_batches(episodes, self.batch_size, self.generator))
        self.used = 0


class Learner:
    """A module in training by AdamW, with the random numbers it uses; it knows its checkpoint."""

    def __init__(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        generator: torch.Generator,
        *,
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        self.module, self.parameters, self.generator = module, parameters, generator
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        self.max_grad_norm = max_grad_norm
        self.processes = processes(parameters[0].device.type)

    def descend(self) -> Tensor:
        """One step down the gradient gathered by ``backward`` since the last, which is clipped; returns its norm."""
        self.processes.add_up([value.grad for value in self.parameters if value.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, run: RunFolder, phase: str, step: int, more: Mapping[str, Tensor] | None = None) -> None:
        """Writes the checkpoint of ``phase`` after update number ``step``, counted from 1, with ``more`` tensors."""
        if not self.processes.is_main:
            return
        tensors = {
            **module_tensors("module", self.module),
            **optimizer_tensors("optimizer", self.optimizer),
            "generator": generator_tensor(self.generator),
            **(more or {}),
        }
        run.save_checkpoint(phase, tensors, {"step": step, "optimizer": optimizer_meta(self.optimizer)})

    def restore(self, run: RunFolder, phase: str) -> tuple[int, dict[str, Tensor]]:
        """Goes back to the checkpoint of ``phase``; returns its step and tensors, 0 and none if there is none."""
        if not run.has_checkpoint(phase):
            return 0, {}
        tensors, meta = run.load_checkpoint(phase)
        load_module(self.module, tensors, "module")
        load_optimizer(self.optimizer, tensors, meta["optimizer"], "optimizer")
        load_generator(self.generator, tensors["generator"])
        return meta["step"], tensors


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
        workers.add_up(list(self.sums.values()))
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


NOISE_BIT = 2**31
"""What tells the seed of a phase's noise from that of its episodes; all seeds of presets lie below."""


def noise_generator(seed: int, device: torch.device) -> torch.Generator:
    """Random numbers for noise, unlike those of an `EpisodeStream` with the same seed."""
    return torch.Generator(device).manual_seed(seed ^ NOISE_BIT)


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
            learner.descend()
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
