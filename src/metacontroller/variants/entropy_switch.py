"""Switching where the model is unsure what comes next: the entropy of its prediction exceeds a running quantile.

    b_t = 1[H_t > q],   q <- q + r (quantile of the batch's H - q)   after each batch in training

with H the entropy of the predicted next residuals (`variants.latent_prediction`). Of several quantiles, an episode has
one, and so a length of segments: a random one in training, a fixed one after it; the emitter is told which. As in
`metacontroller-pytorch`'s single-phase model. Axes: b batch, t steps, n_e residual, k quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError

START = 10.0
"""Of a running quantile, far above first entropies for most widths; it moves towards them within some batches."""


class EntropySwitch(nn.Module):
    """Hard switches without a gradient. quantiles: shares of steps that do not switch, each above 0 and below 1.

    evaluated: which of them holds after training. rate: r. frozen: q stays, and training takes ``evaluated`` too.
    UserError for shares out of range, and for an ``evaluated`` that is none of them.
    """

    running: Tensor

    def __init__(
        self,
        dim: int,
        quantiles: Sequence[float],
        *,
        evaluated: float = 0.5,
        rate: float = 0.1,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.quantiles = tuple(quantiles)
        if not self.quantiles or not all(0 < share < 1 for share in self.quantiles):
            raise UserError(f"quantiles are {list(self.quantiles)}; expected at least one, each between 0 and 1.")
        if evaluated not in self.quantiles:
            raise UserError(f"the evaluated quantile is {evaluated}; expected one of {list(self.quantiles)}.")
        if not 0 < rate <= 1:
            raise UserError(f"the rate of the running quantiles is {rate}; expected a number above 0, at most 1.")
        self.evaluated, self.rate, self.frozen = self.quantiles.index(evaluated), rate, frozen
        self.register_buffer("running", torch.full((len(self.quantiles),), START))
        self.embedding = nn.Embedding(len(self.quantiles), dim)

    def choose(self, batch: int) -> Tensor:
        """The index of each episode's quantile, (b,) int64."""
        device = self.running.device
        if self.training and not self.frozen:
            return torch.randint(len(self.quantiles), (batch,), device=device)
        return torch.full((batch,), self.evaluated, device=device)

    def forward(self, entropy: Tensor, chosen: Tensor) -> Tensor:
        """1 where entropy (b, t) exceeds the quantile of index chosen (b,), else 0: (b, t)."""
        return (entropy > self.running[chosen][:, None]).to(entropy.dtype)

    @torch.no_grad()
    def follow(self, entropy: Tensor, mask: Tensor | None = None, update: bool | None = None) -> None:
        """Moves the running quantiles towards those of entropy (b, t) at real steps, mask (b, t) bool, all if None.

        update: whether to; by default in training, unless frozen.
        """
        if not (self.training and not self.frozen if update is None else update):
            return
        values = (entropy if mask is None else entropy[mask]).flatten().to(self.running.dtype)
        if len(values):
            shares = torch.tensor(self.quantiles, dtype=values.dtype, device=values.device)
            self.running.lerp_(torch.quantile(values, shares), self.rate)
