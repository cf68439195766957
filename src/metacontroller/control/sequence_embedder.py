"""Sequence embedder s(e_1:T): one acausal embedding of a whole episode (eq. 13); used in discovery only."""

from __future__ import annotations

from torch import Tensor, nn

from metacontroller.models.attention import AttentionBody


class SequenceEmbedder(nn.Module):
    """Two-sided attention over the residuals, a masked mean, a linear map: (b, t, n_e) -> (b, n_s)."""

    def __init__(self, dim_model: int, dim_sequence: int, *, dim: int = 64, depth: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.project_in = nn.Linear(dim_model, dim)
        self.body = AttentionBody(dim, depth=depth, heads=heads, causal=False)
        self.norm = nn.LayerNorm(dim)
        self.project_out = nn.Linear(dim, dim_sequence)

    def forward(self, residual: Tensor, mask: Tensor) -> Tensor:
        """residual (b, t, n_e), mask (b, t) bool of real steps -> (b, n_s); padded steps have no influence."""
        x = self.norm(self.body(self.project_in(residual), mask=mask))
        weight = mask.to(x.dtype)[..., None]
        return self.project_out((x * weight).sum(1) / weight.sum(1))
