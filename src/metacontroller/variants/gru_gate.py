"""A switching unit that is a GRU, and the temporal integration (eq. 16, 17): an alternative to `kernels.gate_scan`.

Axis letters: B batch, T time, I inputs, Z code, H hidden units of the unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError


class GruGateOutput(NamedTuple):
    """z (B, T, Z), gate (B, T): the weight of the proposal, hidden (B, H): after the last step."""

    z: Tensor
    gate: Tensor
    hidden: Tensor


def gru_gate(
    gru: nn.GRU,
    to_beta: nn.Linear,
    inputs: Tensor,
    z_tilde: Tensor,
    hidden: Tensor | None,
    z: Tensor,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    straight_through: bool = False,
    fresh: bool = True,
) -> GruGateOutput:
    """For t = 1..T: hidden_t = gru((inputs_t, z_{t-1}), hidden_{t-1}), beta_t = sigmoid(to_beta(hidden_t) /
    temperature), z_t = beta_t z_tilde_t + (1 - beta_t) z_{t-1}.

    inputs (B, T, I), z_tilde (B, T, Z); hidden (B, H) or None for zeros and z (B, Z) are those before the first step.
    gru: one layer over I + Z inputs; what it makes of ``inputs`` is computed before the loop. hard: beta is 1 above
    0.5, else 0; straight_through: then its gradient is that of beta. fresh: the first beta is 1. UserError for a
    temperature that is not positive, or a gru of another number of inputs.
    """
    if temperature <= 0:
        raise UserError(f"temperature is {temperature}; expected a number above 0.")
    own = inputs.shape[-1]
    if gru.input_size != own + z.shape[-1] or gru.num_layers != 1:
        raise UserError(
            f"the gru has {gru.input_size} inputs and {gru.num_layers} layers; expected {own + z.shape[-1]} inputs, "
            "one layer."
        )
    w_in, w_hidden, *biases = gru.all_weights[0]
    b_in, b_hidden = biases if biases else (None, None)
    w_z = w_in[:, own:]
    drive = nn.functional.linear(inputs, w_in[:, :own], b_in)
    hidden = inputs.new_zeros(len(inputs), gru.hidden_size) if hidden is None else hidden
    codes, gates = [], []
    for t in range(inputs.shape[1]):
        reset, keep, new = (drive[:, t] + z @ w_z.T).chunk(3, -1)
        reset_h, keep_h, new_h = nn.functional.linear(hidden, w_hidden, b_hidden).chunk(3, -1)
        kept = torch.sigmoid(keep + keep_h)
        hidden = kept * hidden + (1 - kept) * torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
        beta = torch.sigmoid(to_beta(hidden)[:, 0] / temperature)
        beta = torch.ones_like(beta) if fresh and t == 0 else beta
        if hard:
            switch = (beta > 0.5).to(beta.dtype)
            beta = beta + (switch - beta).detach() if straight_through else switch
        z = beta[:, None] * z_tilde[:, t] + (1 - beta[:, None]) * z
        codes.append(z)
        gates.append(beta)
    return GruGateOutput(torch.stack(codes, 1), torch.stack(gates, 1), hidden)
