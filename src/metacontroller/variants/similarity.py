"""Switching where the residual stops resembling the one before (H-Net's routing, arXiv 2507.07955, section 2.2).

    p_t = (1 - cos(W_q n_t, W_k n_{t-1})) / 2,   p_1 = 1,   b_t = 1[p_t >= 1/2]

with n the normed residual. The switch is hard; its gradient is that of p (straight through).
Axes: b batch, t steps, n_e residual, w width of queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

THRESHOLD = 0.5


class SimilaritySwitch(nn.Module):
    """The probability of a switch from residuals alone, causal, without a loop over time. width: of queries, keys."""

    def __init__(self, dim: int, *, width: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_queries_and_keys = nn.Linear(dim, 2 * width, bias=False)

    def forward(self, residual: Tensor, last_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """residual (b, t, n_e), after the step whose key is last_key (b, w), or from an episode's start without one.

        -> p (b, t), the last key (b, w).
        """
        queries, keys = self.to_queries_and_keys(self.norm(residual)).chunk(2, -1)
        before = torch.cat([keys[:, :1] if last_key is None else last_key[:, None], keys[:, :-1]], 1)
        probability = (1 - F.cosine_similarity(queries, before, dim=-1)) / 2
        if last_key is None:
            probability = torch.cat([torch.ones_like(probability[:, :1]), probability[:, 1:]], 1)
        return probability, keys[:, -1]


def hard_switch(probability: Tensor) -> Tensor:
    """1[p >= 1/2] with the gradient of p: (b, t) -> (b, t)."""
    switched = (probability >= THRESHOLD).to(probability.dtype)
    return probability + (switched - probability).detach()


def confidence(probability: Tensor) -> Tensor:
    """Ones with the gradient of p where a step switches and of 1 - p where it holds: (b, t) -> (b, t).

    What is multiplied by it teaches the gate to be sure where its choice helps (H-Net, section 2.2).
    """
    chosen = torch.where(probability >= THRESHOLD, probability, 1 - probability)
    return chosen + (1 - chosen).detach()
