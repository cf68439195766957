"""Sequence embedders that are not `control.sequence_embedder`'s: pooled attention, a GRU's last state, any module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metacontroller.control.sequence_embedder import mean_of_steps
from metacontroller.models.attention import AttentionBody


class PooledBody(nn.Module):
    """An attention body with a norm at its end, whose mean over real steps is repeated at each of them if ``pooled``.

    causal, options: of `AttentionBody`.
    """

    def __init__(self, dim: int, *, pooled: bool, causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.body, self.norm = AttentionBody(dim, causal=causal, **options), nn.LayerNorm(dim)
        self.pooled = pooled

    def forward(self, x: Tensor, mask: Tensor | None = None, **ignored: Any) -> Tensor:
        """x (b, t, n); mask (b, t) bool of real steps, all if None -> (b, t, n)."""
        hidden = self.norm(self.body(x, mask=mask))
        if not self.pooled:
            return hidden
        mean = hidden.mean(1) if mask is None else mean_of_steps(hidden, mask)
        return mean[:, None].expand_as(hidden)


class ModuleEmbedder(nn.Module):
    """Any module as a sequence embedder: ``module(residual, mask=mask)`` -> (b, t, n), then a linear map to n_s."""

    def __init__(self, module: nn.Module, dim: int, dim_sequence: int) -> None:
        super().__init__()
        self.body = module
        self.project_out = nn.Linear(dim, dim_sequence)

    def forward(self, residual: Tensor, mask: Tensor) -> Tensor:
        """residual (b, t, n_e), mask (b, t) bool of real steps -> (b, t, n_s)."""
        return self.project_out(self.body(residual, mask=mask))


class LastState(nn.Module):
    """A GRU's last state at each episode's end, repeated: (b, t, n) -> (b, t, n), the same at every step.

    options: of the GRU, such as num_layers.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim, batch_first=True, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None, episode_lens: Tensor | None = None) -> Tensor:
        """x (b, t, n); mask (b, t) bool or episode_lens (b,) tell the real steps, all if neither is given."""
        out, _ = self.gru(x)
        steps = x.shape[1]
        if episode_lens is None:
            episode_lens = x.new_full((len(x),), steps) if mask is None else mask.sum(1)
        last = (episode_lens.long() - 1)[:, None, None].expand(-1, 1, x.shape[-1])
        return out.gather(1, last).expand(-1, steps, -1)
