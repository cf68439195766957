"""Sequence embedder s(e_1:T): an acausal embedding of a whole episode (eq. 13); used only in discovery."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from metacontroller.models.attention import AttentionBody
from metacontroller.models.hawk import HawkBody
from metacontroller.ranges import check_choice

EmbedderKind = Literal["attention", "hawk", "causal-attention", "gru"]
KINDS = get_args(EmbedderKind)


class SequenceEmbedder(nn.Module):
    """A stack of blocks over the residuals, pooled to one vector, and a linear map: (b, t, n_e) -> (b, n_s).

    kind "attention": two-sided attention, masked mean over the steps. "hawk" (the paper's SSM), "causal-attention" and
    "gru" (one layer): they run forwards, and the last real step is taken. pooled: if false, every step has an embedding
    of its own, (b, t, n_s); of the kinds that run forwards it then knows the past alone. UserError for another kind.
    """

    def __init__(
        self,
        dim_model: int,
        dim_sequence: int,
        *,
        dim: int = 64,
        depth: int = 1,
        heads: int = 4,
        dim_head: int | None = None,
        mlp_dim: int | None = None,
        kind: EmbedderKind = "attention",
        pooled: bool = True,
    ) -> None:
        super().__init__()
        check_choice("the sequence embedder's kind", kind, KINDS)
        self.kind, self.pooled = kind, pooled
        self.project_in = nn.Linear(dim_model, dim)
        if kind == "hawk":
            self.body = HawkBody(dim, depth=depth, heads=heads, mlp_dim=mlp_dim)
        elif kind == "gru":
            self.body = nn.GRU(dim, dim, num_layers=depth, batch_first=True)
        else:
            sizes = {"depth": depth, "heads": heads, "dim_head": dim_head, "mlp_dim": mlp_dim}
            self.body = AttentionBody(dim, **sizes, causal=kind != "attention")
        self.norm = nn.LayerNorm(dim)
        self.project_out = nn.Linear(dim, dim_sequence)

    def forward(self, residual: Tensor, mask: Tensor) -> Tensor:
        """residual (b, t, n_e), mask (b, t) bool of real steps, before padding -> (b, n_s) or (b, t, n_s).

        Of real steps, independent of padding.
        """
        x = self.project_in(residual)
        if self.kind != "attention":
            x = self.body(x)
            x = x[0] if isinstance(x, tuple) else x
            if self.pooled:
                last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, x.shape[-1])
                x = x.gather(1, last)[:, 0]
            return self.project_out(self.norm(x))
        x = self.norm(self.body(x, mask=mask))
        if not self.pooled:
            return self.project_out(x)
        return self.project_out(mean_of_steps(x, mask))


def mean_of_steps(x: Tensor, mask: Tensor) -> Tensor:
    """x (b, t, n), mask (b, t) bool of real steps -> their mean (b, n)."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1)
