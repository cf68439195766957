"""Sequence embedder s(e_1:T): an acausal embedding of a whole episode (eq. 13); used only in discovery."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.models.attention import AttentionBody
from metacontroller.models.hawk import HawkBody

EmbedderKind = Literal["attention", "hawk", "causal-attention", "gru"]
KINDS = ("attention", "hawk", "causal-attention", "gru")


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
        if kind not in KINDS:
            raise UserError(f"the sequence embedder's kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}.")
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
        return self.project_out(_mean_of_steps(x, mask))


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
        mean = hidden.mean(1) if mask is None else _mean_of_steps(hidden, mask)
        return mean[:, None].expand_as(hidden)


def _mean_of_steps(x: Tensor, mask: Tensor) -> Tensor:
    """x (b, t, n), mask (b, t) bool of real steps -> their mean (b, n)."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1)


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
