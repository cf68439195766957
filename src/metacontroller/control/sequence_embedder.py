"""Sequence embedder s(e_1:T): one acausal embedding of a whole episode (eq. 13); used only in discovery."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.models.attention import AttentionBody
from metacontroller.models.hawk import HawkBody

EmbedderKind = Literal["attention", "hawk"]


class SequenceEmbedder(nn.Module):
    """A stack of blocks over the residuals, pooled to one vector, and a linear map: (b, t, n_e) -> (b, n_s).

    kind "attention": two-sided attention, masked mean over the steps. "hawk": recurrent (the paper's SSM), last real
    step. UserError for another kind.
    """

    def __init__(
        self,
        dim_model: int,
        dim_sequence: int,
        *,
        dim: int = 64,
        depth: int = 1,
        heads: int = 4,
        kind: EmbedderKind = "attention",
    ) -> None:
        super().__init__()
        if kind not in ("attention", "hawk"):
            raise UserError(f"the sequence embedder's kind is {kind!r}; expected 'attention' or 'hawk'.")
        self.project_in = nn.Linear(dim_model, dim)
        if kind == "attention":
            self.body = AttentionBody(dim, depth=depth, heads=heads, causal=False)
        else:
            self.body = HawkBody(dim, depth=depth, heads=heads)
        self.norm = nn.LayerNorm(dim)
        self.project_out = nn.Linear(dim, dim_sequence)

    def forward(self, residual: Tensor, mask: Tensor) -> Tensor:
        """residual (b, t, n_e), mask (b, t) bool of real steps, before padding -> (b, n_s), independent of padding."""
        x = self.project_in(residual)
        if isinstance(self.body, HawkBody):
            last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, x.shape[-1])
            return self.project_out(self.norm(self.body(x).gather(1, last)[:, 0]))
        x = self.norm(self.body(x, mask=mask))
        weight = mask.to(x.dtype)[..., None]
        return self.project_out((x * weight).sum(1) / weight.sum(1))
