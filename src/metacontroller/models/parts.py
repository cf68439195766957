"""Losses of a frozen stack, a few rows at a time: memory of one part, whatever the batch; nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}
"""Steps of episodes in one part: on a CPU its activations should stay in the cache, on a GPU they must fill it."""

PartLosses = Callable[[Tensor, slice], Tensor]
"""(part of the input, its rows of the batch) -> losses (n,), what this part adds to those of the whole batch."""


def row_parts(values: Tensor) -> list[slice]:
    """The rows of values (b, t, ...) in parts of at most `TOKENS_AT_ONCE` steps, one row at least."""
    batch, steps = values.shape[:2]
    rows = max(1, TOKENS_AT_ONCE.get(values.device.type, TOKENS_AT_ONCE["cuda"]) // steps)
    return [slice(start, start + rows) for start in range(0, batch, rows)]


def losses_in_parts(residual: Tensor, part_losses: PartLosses) -> Tensor:
    """Sum of ``part_losses`` over the parts of residual (b, t, n), (n,); its only gradient is that of the residual.

    The gradient is taken part by part on the way forward, and scaled on the way back: what ``part_losses`` computes
    with must need none.
    """
    if torch.is_grad_enabled() and residual.requires_grad:
        return _LossesInParts.apply(residual, part_losses)  # pyright: ignore[reportReturnType]
    return torch.stack([part_losses(residual[rows], rows) for rows in row_parts(residual)]).sum(0)


class _LossesInParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual: Tensor, part_losses: PartLosses) -> Tensor:
        totals, gradients = [], []
        for rows in row_parts(residual):
            with torch.enable_grad():
                part = residual[rows].detach().requires_grad_()
                losses = part_losses(part, rows).unbind()
            kept = [index + 1 < len(losses) for index in range(len(losses))]
            grads = [
                torch.autograd.grad(loss, part, retain_graph=keep) for loss, keep in zip(losses, kept, strict=True)
            ]
            gradients.append([gradient for (gradient,) in grads])
            totals.append(torch.stack(losses).detach())
        ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*gradients, strict=True)))
        return torch.stack(totals).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor) -> tuple[Tensor, None]:
        gradient = sum(weight * value for weight, value in zip(grad_losses, ctx.saved_tensors, strict=True))
        return gradient, None  # pyright: ignore[reportReturnType] - there is one loss at least
