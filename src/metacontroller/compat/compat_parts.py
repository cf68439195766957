"""Small modules under the other library's names and arguments, each one of ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metacontroller.control.sequence_embedder import LastState, PooledBody
from metacontroller.variants.latent_prediction import NextLatent
from metacontroller.variants.loss_weights import LossScale
from metacontroller.variants.proposers import ModuleProposer

from .compat_names import OtherNames, body_options, other_names


class ActionProposerWrapper(OtherNames, ModuleProposer):
    """Any module as an action proposer."""

    def __init__(
        self, module: nn.Module, cache_key: str = "cache", return_cache_key: str | None = "return_hiddens"
    ) -> None:
        super().__init__(module, cache_key, return_cache_key)
        self.remember_arguments(locals())

    def forward(self, x: Tensor, cache: Any = None, keep: bool = False) -> tuple[Tensor, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (b, t, n), after the steps of ``cache`` -> (b, t, n), next cache."""
        return super().forward(x, cache, keep)


class BidirectionalSequenceEmbedder(OtherNames, PooledBody):
    """Two-sided attention, by default its mean over real steps repeated; options: of a body."""

    def __init__(self, dim: int, pool: bool = True, **options: Any) -> None:
        super().__init__(dim, pooled=pool, **body_options(options, dim))
        self.remember_arguments(locals())


class CausalSequenceEmbedder(OtherNames, PooledBody):
    """Causal attention; options: of a body."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, pooled=False, causal=True, **body_options(options, dim))
        self.remember_arguments(locals())

    def forward(self, x: Tensor, mask: Tensor | None = None, **ignored: Any) -> Tensor:
        """x (b, t, n) -> (b, t, n); padding comes last, so that no real step sees it."""
        return super().forward(x)


class CompactSequenceEmbedder(OtherNames, LastState):
    """A GRU's last state at each episode's end, repeated; options: of the GRU."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        self.remember_arguments(locals())


@other_names({"loss_scale": "scale"})
class LossNormalizer(LossScale):
    """Losses divided by their running root mean squares."""

    def __init__(self, num_losses: int = 1, beta: float = 0.999, eps: float = 1e-6) -> None:
        super().__init__(beta, eps, count=num_losses)

    def forward(self, losses: Tensor, update_ema: bool | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """losses (num_losses,), or a scalar -> the same, scaled. update_ema: by default in training."""
        return super().forward(losses, update_ema)


class ResidualDynamics(nn.Module):
    """The next latent from the next token's embedding and the latent now, in this order."""

    def __init__(
        self, dim: int, cond_dim: int | None = None, hidden_dim: int | None = None, num_layers: int = 3
    ) -> None:
        super().__init__()
        self.net = NextLatent(dim, dim_action=cond_dim, hidden=hidden_dim, layers=num_layers)

    def forward(self, next_token_embeds: Tensor, curr_latent: Tensor) -> Tensor:
        """next_token_embeds (b, t, cond_dim), curr_latent (b, t, n) -> (b, t, n)."""
        return self.net(curr_latent, next_token_embeds)
