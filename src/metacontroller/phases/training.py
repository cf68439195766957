"""The loop that pretraining and discovery share: batches in, AdamW steps, metrics, checkpoints, exact resumption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metacontroller.data.trajectories import Trajectories, length_sorted_batches
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
    """AdamW with betas 0.9 and 0.999 (paper, table A3 and following) and how long to train.

    steps: updates. batch_size: episodes each. decay_steps: the learning rate falls linearly to zero over the last so many
    steps; 0 keeps it constant, as in the paper. max_grad_norm: gradients are clipped to it (the paper is silent).
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.03
    decay_steps: int = 0
    max_grad_norm: float = 1.0
    log_every: int = 50
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; expected a number above 0.")
        if not 0 <= self.decay_steps <= self.steps:
            raise ValueError(f"decay_steps is {self.decay_steps}; expected 0..{self.steps}, the number of steps.")

    def lr_at(self, step: int) -> float:
        """Learning rate of update number ``step``, counted from 0."""
        left = self.steps - step
        return self.lr * min(1.0, left / self.decay_steps) if self.decay_steps else self.lr


Generate = Callable[[int, torch.Generator], Trajectories]
"""A source of behaviour: ``generate(n, generator)`` returns n fresh (or drawn) episodes."""


class EpisodeStream:
    """Endless length-sorted batches from a source, in windows; its position can be saved and restored exactly."""

    def __init__(self, generate: Generate, batch_size: int, seed: int, window: int = 8) -> None:
        self.generate, self.batch_size, self.window = generate, batch_size, window
        self.generator = torch.Generator().manual_seed(seed)
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
        self.generator.set_state(tensors["stream.window"])
        self._open_window()
        self.used = int(tensors["stream.used"])

    def _open_window(self) -> None:
        self.window_start = self.generator.get_state()
        episodes = self.generate(self.window * self.batch_size, self.generator)
        self.batches = list(length_sorted_batches(episodes, self.batch_size, self.generator))
        self.used = 0


LossFunction = Callable[[Trajectories, int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


def train(
    phase: str,
    config: OptimizerConfig,
    module: nn.Module,
    parameters: list[nn.Parameter],
    stream: EpisodeStream,
    loss_function: LossFunction,
    run: RunFolder,
    *,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = False,
) -> None:
    """Trains ``parameters`` of ``module`` in place.

    ``loss_function(batch, step, noise)`` returns the loss and metrics to log (means over the log interval are kept).
    Checkpoints go to ``run`` under the phase's name; with ``resume`` training goes on from the last one, bit for bit as if it
    had never stopped. A finished phase is not trained again.
    """
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    noise = torch.Generator(device).manual_seed(seed)
    first = 0
    if resume and run.has_checkpoint(phase):
        tensors, meta = run.load_checkpoint(phase)
        load_module(module, tensors, "module")
        load_optimizer(optimizer, tensors, meta["optimizer"], "optimizer")
        load_generator(noise, tensors["noise"])
        first = meta["step"]
        if first < config.steps:
            stream.restore(tensors)
        run.rewind_metrics(phase, first)
    module.train()
    sums: dict[str, Tensor] = {}
    with track(config.steps, phase, start=first, quiet=quiet) as progress:
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            loss, metrics = loss_function(stream.next().to(device), step, noise)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach()
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                interval = done % config.log_every or config.log_every
                means = {name: float(value) / min(interval, done - first) for name, value in sums.items()}
                run.log_metrics(phase, done, **means)
                progress.update(done, **means)
                sums = {}
            if done % config.checkpoint_every == 0 or done == config.steps:
                tensors = {
                    **module_tensors("module", module),
                    **optimizer_tensors("optimizer", optimizer),
                    **stream.tensors(),
                    "noise": generator_tensor(noise),
                }
                run.save_checkpoint(phase, tensors, {"step": done, "optimizer": optimizer_meta(optimizer)})
    module.eval()
