"""AdamW, and Muon beside it: settings, one optimizer step, checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.ranges import Count, CountOr0, NotNegative, Positive, Rows, check_fields, require
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.tensor_file import not_finite
from metacontroller.storage.training_state import (
    load_module,
    load_optimizer,
    module_tensors,
    optimizer_meta,
    optimizer_tensors,
)
from metacontroller.training.distributed import processes
from metacontroller.training.divergence import NotFinite, check_module
from metacontroller.training.progress import announce

_SINGULAR = {"processes": "process", "threads": "thread"}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with betas 0.9 and 0.999 (paper, table A3 and following) and how long to train.

    UserError for values out of range.
    """

    steps: Count
    """Number of updates."""
    batch_size: Rows
    """Episodes per update."""
    lr: Positive
    """Learning rate."""
    weight_decay: NotNegative = 0.03
    """Decoupled weight decay of AdamW."""
    decay_steps: CountOr0 = 0
    """Updates at the end over which the learning rate falls linearly to zero; 0 keeps it constant (the paper)."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm (our choice; the paper gives none)."""
    log_every: Count = 50
    """Updates from one line of metrics to the next."""
    checkpoint_every: Count = 500
    """Updates from one checkpoint to the next."""

    def __post_init__(self) -> None:
        check_fields(self)
        expected = f"0..{self.steps}, the number of steps"
        require(self.decay_steps <= self.steps, "decay_steps", self.decay_steps, expected)

    def share_of_lr(self, step: int) -> float:
        """Learning rate of update number ``step``, counted from 0, as a share of ``lr``."""
        return min(1.0, (self.steps - step) / self.decay_steps) if self.decay_steps else 1.0


def linear_warmup(step: int, between: tuple[int, int]) -> float:
    """Factor of a linear warm-up at update number ``step``, counted from 0: 0 before between[0], 1 from between[1]."""
    start, end = between
    return 1.0 if step >= end else max(0.0, (step - start) / (end - start))


class Learner:
    """A module in training with AdamW, its rng, and its checkpoints.

    matrices: those of ``parameters`` that Muon trains instead, where ``muon_lr`` is above 0; of one with three axes,
    each slice is a matrix. UserError if this torch has no Muon.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        generator: torch.Generator,
        *,
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
        matrices: Sequence[nn.Parameter] = (),
        muon_lr: float = 0.0,
    ) -> None:
        self.module, self.parameters, self.generator = module, parameters, generator
        by_muon = {id(matrix) for matrix in matrices} if muon_lr else set()
        rest = [value for value in parameters if id(value) not in by_muon]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "optimizer": torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=True)
        }
        self.slices: list[tuple[nn.Parameter, list[nn.Parameter]]] = []  # with those that they share the memory of
        if by_muon:
            if not hasattr(torch.optim, "Muon"):
                needs = "no Muon; install 2.9 or later, or set 0"
                raise UserError(f"muon_lr is {muon_lr}, and torch {torch.__version__} has {needs}.")
            flat = [value for value in matrices if value.dim() == 2]
            self.slices = [(value, list(map(nn.Parameter, value.data))) for value in matrices if value.dim() == 3]
            flat += [part for _, slices in self.slices for part in slices]
            options = {"lr": muon_lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self.optimizers["muon"] = torch.optim.Muon(flat, **options)  # steps as long as AdamW's of the same lr
        self.lr = {"optimizer": lr, "muon": muon_lr}
        self.max_grad_norm = max_grad_norm
        self.processes = processes(parameters[0].device.type)

    def scale_lr(self, factor: float) -> None:
        """Sets every learning rate to ``factor`` of that given at first."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * self.lr[name]

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        for matrix, _ in self.slices:
            matrix.grad = None

    @property
    def lr_now(self) -> float:
        """AdamW's learning rate, scaled."""
        return self.optimizers["optimizer"].param_groups[0]["lr"]

    def optimizer_step(self, loss: Tensor) -> Tensor:
        """All-reduces and clips the accumulated gradients, takes one optimizer step, resets them; returns their norm.

        The norm, a scalar, is that before clipping. loss: this process's part, a scalar. NotFinite, in all processes
        and before anything changes, if the loss or a gradient of any of them is not finite.
        """
        gradients = [value.grad for value in self.parameters if value.grad is not None]
        loss = loss.detach().to(gradients[0].dtype, copy=True)
        self.processes.all_reduce([*gradients, loss])
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {float(loss)}")
        norm = self._clip(gradients)
        for matrix, slices in self.slices:
            gradients = [None] * len(slices) if matrix.grad is None else matrix.grad
            for part, gradient in zip(slices, gradients, strict=True):
                part.grad = gradient
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.zero_grad()
        return norm

    def _clip(self, gradients: list[Tensor]) -> Tensor:
        """Clips the gradients and returns their norm before; NotFinite names the first that is not finite."""
        try:
            return nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, 2.0, True)
        except RuntimeError as error:
            if "non-finite" not in str(error):
                raise
        name = not_finite({key: value.grad for key, value in self.module.named_parameters() if value.grad is not None})
        if name is not None:
            raise NotFinite(f"the gradient of {name} is not finite")
        largest = max(gradient.abs().max() for gradient in gradients)  # finite: the sum of their squares overflows
        for gradient in gradients:
            gradient /= largest
        return largest * nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)

    def save(
        self,
        run: RunFolder,
        phase: str,
        step: int,
        more: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the checkpoint of ``phase`` after ``step`` updates, with ``more`` tensors and JSON values ``facts``;
        first process only.

        NotFinite, in all processes, if the module is not finite: then the checkpoint before stays.
        """
        check_module(self.module)
        if not self.processes.is_main:
            return
        tensors = {**module_tensors("module", self.module), "generator": self.generator.get_state(), **(more or {})}
        meta: dict[str, Any] = {**(facts or {}), "step": step, **self._shared_by()}
        for name, optimizer in self.optimizers.items():
            tensors |= optimizer_tensors(name, optimizer)
            meta[name] = optimizer_meta(optimizer)
        run.save_checkpoint(phase, tensors, meta)

    def _shared_by(self) -> dict[str, int]:
        """The numbers of processes and, on a CPU, of threads of each: with others, sums are rounded otherwise, and RL
        plays other episodes."""
        on_cpu = self.parameters[0].device.type == "cpu"
        return {"processes": self.processes.count, **({"threads": torch.get_num_threads()} if on_cpu else {})}

    def restore(self, run: RunFolder, phase: str, steps: int) -> tuple[int, dict[str, Tensor]]:
        """Loads the checkpoint of ``phase``; returns its step and tensors, or 0 and no tensors if there is none.

        steps: with which the phase is done. Where more of them are to come, and the checkpoint was made with another
        number of processes or threads, standard error says so.
        """
        if not run.has_checkpoint(phase):
            return 0, {}
        tensors, meta = run.load_checkpoint(phase)
        try:
            load_module(self.module, tensors, "module")
            for name, optimizer in self.optimizers.items():
                load_optimizer(optimizer, tensors, meta[name], name)
            self.generator.set_state(tensors["generator"].cpu())
            step = int(meta["step"])
        except UserError as error:
            raise UserError(f"{run.checkpoint_path(phase)}: {error}") from error
        except (KeyError, TypeError, IndexError, RuntimeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{run.checkpoint_path(phase)} is no whole checkpoint of {phase} ({error!r}); delete it and run the "
                "phase again."
            ) from error
        now = self._shared_by()
        before = {name: meta.get(name, count) for name, count in now.items()}
        if step < steps and before != now and self.processes.is_main:
            announce(
                f"{phase}: goes on with {_counted(now)} where it had {_counted(before)}; from here on it is not, bit "
                "for bit, the run that it would have been."
            )
        return step, tensors


def _counted(counts: Mapping[str, int]) -> str:
    """Such as "2 processes and 1 thread"."""
    return " and ".join(f"{count} {name if count != 1 else _SINGULAR[name]}" for name, count in counts.items())
