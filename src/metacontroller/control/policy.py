"""Causal policy over abstract actions, pi(z | e_1:t): internal RL trains it to replace the acausal encoder (C.5)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.models.hawk import TAPS, HawkBlock

PolicyKind = Literal["gru", "hawk"]


class AbstractActionPolicy(nn.Module):
    """Recurrent policy whose state advances only at switches; initialised to the prior, parameters that are all 0.

    kind "gru": a GRU of width ``hidden``. "hawk": one Hawk block of that width, as in the paper (C.5). UserError for
    another kind.

    params: p, numbers that give a distribution of codes (`control.codes`); by default 2 n_z, mean, then log standard
    deviation. Axes: b batch, k switches of an episode in order, n_e residual.
    """

    every_step = False

    def __init__(
        self, dim_model: int, dim_latent: int, *, hidden: int = 256, kind: PolicyKind = "gru", params: int | None = None
    ) -> None:
        super().__init__()
        if kind not in ("gru", "hawk"):
            raise UserError(f"the policy's kind is {kind!r}; expected 'gru' or 'hawk'.")
        self.norm = nn.LayerNorm(dim_model)
        if kind == "gru":
            self.recurrence = _GRU(dim_model, hidden)
        else:
            self.recurrence = _Hawk(dim_model, hidden)
        self.readout = nn.Linear(hidden, 2 * dim_latent if params is None else params)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, residual: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residuals at consecutive switches (b, k, n_e), state (b, s) -> distributions (b, k, p), next state.

        Without a state, the first switch is the first of an episode.
        """
        out, last = self.recurrence(self.norm(residual), state)
        return self.readout(out), last

    def initial_state(self, batch: int) -> Tensor:
        """(b, s) zeros: the recurrent state before an episode."""
        return self.readout.weight.new_zeros(batch, self.recurrence.state_size)


def gru_step(gru: nn.GRU, x: Tensor, state: Tensor) -> Tensor:
    """One step of a one-layer GRU, x (b, i), state (b, h) -> (b, h); faster than a call of the module."""
    return torch.gru_cell(x, state, *gru.all_weights[0])


class _GRU(nn.GRU):
    """A GRU with a state of shape (b, s)."""

    def __init__(self, dim_model: int, hidden: int) -> None:
        super().__init__(dim_model, hidden, batch_first=True)
        self.state_size = hidden

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 1 and state is not None:
            last = gru_step(self, x[:, 0], state)
            return last[:, None], last
        out, last = super().forward(x, None if state is None else state[None].contiguous())
        return out, last[0]


class _Hawk(nn.Module):
    """One Hawk block with a state of shape (b, s): that of the recurrence, then the convolution's last inputs."""

    def __init__(self, dim_model: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.state_size = hidden, TAPS * hidden
        self.project_in = nn.Linear(dim_model, hidden)
        self.block = HawkBlock(hidden, width=hidden, heads=8, mlp_dim=2 * hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        recurrent = recent = None
        if state is not None:
            recurrent, recent = state.split([self.hidden, (TAPS - 1) * self.hidden], -1)
            recent = recent.unflatten(-1, (TAPS - 1, self.hidden))
        out, recurrent, recent = self.block(self.project_in(x), recurrent, recent)
        return self.norm(out), torch.cat([recurrent.to(x.dtype), recent.flatten(1)], -1)
