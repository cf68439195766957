"""Other switches than the paper's: by similarity of residuals, by the entropy of their prediction, by a GRU.

Axes: b batch, t steps, n_e residual, w width of queries and keys, k quantiles, n_z code, h hidden units of the GRU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.ranges import Number, Positive, check

THRESHOLD = 0.5
START = 10.0
"""Of a running quantile, far above first entropies for most widths; it moves towards them within some batches."""


class SimilaritySwitch(nn.Module):
    """The probability of a switch where the residual stops resembling the one before, causal, without a loop over time
    (H-Net's routing, arXiv 2507.07955, section 2.2):

        p_t = (1 - cos(W_q n_t, W_k n_{t-1})) / 2,   p_1 = 1,   b_t = 1[p_t >= 1/2]

    with n the normed residual. The switch is hard; its gradient is that of p (straight through). width: of W_q, W_k.
    """

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
        return open_at_first(probability) if last_key is None else probability, keys[:, -1]


def open_at_first(probability: Tensor) -> Tensor:
    """The probabilities (b, t) of an episode from its start: its first step takes a code."""
    return torch.cat([torch.ones_like(probability[:, :1]), probability[:, 1:]], 1)


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


class EntropySwitch(nn.Module):
    """Switches where the entropy H of the predicted next residuals exceeds a running quantile q, without a gradient:

        b_t = 1[H_t > q],   q <- q + r (quantile of the batch's H - q)   after each batch in training

    quantiles: shares of steps that do not switch, each above 0 and below 1. Of several, an episode has one, and so a
    length of segments: a random one in training, ``evaluated`` after it; the emitter is told which. rate: r. frozen:
    q stays, and training takes ``evaluated`` too. UserError for shares out of range, and for an ``evaluated`` that is
    none of them. As in `metacontroller-pytorch`'s single-phase model.
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
        check("quantiles", self.quantiles, tuple[Number(0, 1, above=True, below=True), ...])
        if evaluated not in self.quantiles:
            raise UserError(f"the evaluated quantile is {evaluated}; expected one of {list(self.quantiles)}.")
        check("rate of the running quantiles", rate, Number(0, 1, above=True))
        self.evaluated, self.rate, self.frozen = self.quantiles.index(evaluated), rate, frozen
        self.register_buffer("running", torch.full((len(self.quantiles),), START))
        self.embedding = nn.Embedding(len(self.quantiles), dim)

    @property
    def learns(self) -> bool:
        """Whether quantiles are drawn and followed."""
        return self.training and not self.frozen

    def choose(self, batch: int) -> Tensor:
        """The index of each episode's quantile, (b,) int64."""
        if self.learns:
            return torch.randint(len(self.quantiles), (batch,), device=self.running.device)
        return torch.full((batch,), self.evaluated, device=self.running.device)

    def forward(self, entropy: Tensor, chosen: Tensor) -> Tensor:
        """1 where entropy (b, t) exceeds the quantile of index chosen (b,), else 0: (b, t)."""
        return (entropy > self.running[chosen][:, None]).to(entropy.dtype)

    @torch.no_grad()
    def follow(self, entropy: Tensor, mask: Tensor | None = None, update: bool | None = None) -> None:
        """Moves the running quantiles towards those of entropy (b, t) at real steps, mask (b, t) bool, all if None.

        update: whether to; by default in training, unless frozen.
        """
        values = (entropy if mask is None else entropy[mask]).flatten().to(self.running.dtype)
        if len(values) and (self.learns if update is None else update):
            shares = torch.tensor(self.quantiles, dtype=values.dtype, device=values.device)
            self.running.lerp_(torch.quantile(values, shares), self.rate)


def gru_gate(
    gru: nn.GRU,
    to_beta: nn.Linear,
    inputs: Tensor,
    z_tilde: Tensor,
    hidden: Tensor | None,
    z: Tensor,
    temperature: float = 1.0,
    hard: bool = False,
    straight_through: bool = False,
    fresh: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """For t = 1..T: hidden_t = gru((inputs_t, z_{t-1}), hidden_{t-1}), beta_t = sigmoid(to_beta(hidden_t) /
    temperature), z_t = beta_t z_tilde_t + (1 - beta_t) z_{t-1}.

    inputs (b, t, i), z_tilde (b, t, n_z); hidden (b, h) or None for zeros and z (b, n_z): before the first step. gru:
    one layer over i + n_z inputs. hard: beta is 1 above 0.5, else 0; straight_through: then its gradient is that of
    beta. fresh: the first beta is 1. Returns beta (b, t), z (b, t, n_z) and the last hidden. UserError for a
    temperature that is not positive, or another gru.
    """
    check("temperature", temperature, Positive)
    expected = inputs.shape[-1] + z.shape[-1]
    if (gru.input_size, gru.num_layers) != (expected, 1):
        raise UserError(f"the gru has {gru.input_size} inputs, {gru.num_layers} layers; expected {expected} and 1.")
    hidden = inputs.new_zeros(len(inputs), gru.hidden_size) if hidden is None else hidden
    gates, codes = [], []
    for t in range(inputs.shape[1]):
        hidden = torch.gru_cell(torch.cat([inputs[:, t], z], -1), hidden, *gru.all_weights[0])
        beta = torch.sigmoid(to_beta(hidden)[:, 0] / temperature)
        beta = torch.ones_like(beta) if fresh and t == 0 else beta
        if hard:
            switch = (beta > 0.5).to(beta.dtype)
            beta = beta + (switch - beta).detach() if straight_through else switch
        z = beta[:, None] * z_tilde[:, t] + (1 - beta[:, None]) * z
        gates.append(beta)
        codes.append(z)
    return torch.stack(gates, 1), torch.stack(codes, 1), hidden
