"""Losses of a frozen stack in chunks of rows: memory does not grow with the batch, and nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 65_536}
"""Steps of episodes in one chunk: few enough for a CPU's cache, enough to occupy a GPU."""

ChunkLosses = Callable[[Tensor, slice], Tensor]
"""(chunk of the input, its rows of the batch) -> losses (n,), this chunk's terms of the whole batch's losses."""


def row_chunks(values: Tensor) -> list[slice]:
    """Splits the rows of values (b, t, ...) into chunks of at most `TOKENS_AT_ONCE` steps, but at least one row."""
    batch, steps = values.shape[:2]
    rows = max(1, TOKENS_AT_ONCE.get(values.device.type, TOKENS_AT_ONCE["cuda"]) // steps)
    return [slice(start, start + rows) for start in range(0, batch, rows)]


def chunked_losses(residual: Tensor, chunk_losses: ChunkLosses) -> Tensor:
    """Sum of ``chunk_losses`` over the chunks of residual (b, t, n_e), (n,); only the residual gets a gradient.

    The gradient is computed chunk by chunk in the forward pass, and scaled in the backward pass, so nothing else that
    ``chunk_losses`` uses may require a gradient.
    """
    if torch.is_grad_enabled() and residual.requires_grad:
        return _ChunkedLosses.apply(residual, chunk_losses)  # pyright: ignore[reportReturnType]
    return torch.stack([chunk_losses(residual[rows], rows) for rows in row_chunks(residual)]).sum(0)


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual: Tensor, chunk_losses: ChunkLosses) -> Tensor:
        totals, gradients = [], []
        for rows in row_chunks(residual):
            with torch.enable_grad():
                chunk = residual[rows].detach().requires_grad_()
                losses = chunk_losses(chunk, rows).unbind()
            again = [True] * (len(losses) - 1) + [False]  # whether another loss needs the graph
            pairs = zip(losses, again, strict=True)
            gradients.append([torch.autograd.grad(loss, chunk, retain_graph=keep)[0] for loss, keep in pairs])
            totals.append(torch.stack(losses).detach())
        ctx.save_for_backward(*(torch.cat(chunks) for chunks in zip(*gradients, strict=True)))
        return torch.stack(totals).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor) -> tuple[Tensor, None]:
        gradient = sum(weight * value for weight, value in zip(grad_losses, ctx.saved_tensors, strict=True))
        return gradient, None  # pyright: ignore[reportReturnType] - there is one loss at least
