"""Causal policy over abstract actions, pi(z | e_1:t): what internal RL trains in place of the acausal encoder (C.5)."""

from __future__ import annotations

from torch import Tensor, nn


class AbstractActionPolicy(nn.Module):
    """Recurrent Gaussian policy; its state advances only at switches. It starts as the prior N(0, I).

    Axes: b batch, k switches of an episode in order, n_e residual, n_z code. A distribution is one tensor (..., 2 n_z):
    mean, then log standard deviation.
    """

    def __init__(self, dim_model: int, dim_latent: int, *, hidden: int = 256) -> None:
        super().__init__()
        self.hidden = hidden
        self.norm = nn.LayerNorm(dim_model)
        self.recurrence = nn.GRU(dim_model, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, 2 * dim_latent)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, residual: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residuals at consecutive switches (b, k, n_e), state (b, hidden) -> distributions (b, k, 2 n_z), next state.

        Without a state, the first of them is the first of an episode.
        """
        initial = None if state is None else state[None].contiguous()
        out, last = self.recurrence(self.norm(residual), initial)
        return self.readout(out), last[0]

    def initial_state(self, batch: int) -> Tensor:
        """(b, hidden) zeros."""
        return self.readout.weight.new_zeros(batch, self.hidden)
