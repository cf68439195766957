"""The switching gate as a plain loop that autograd differentiates: slow and simple; the fast paths are tested on it.

Axis letters: B batch, T time, K hidden units of the switching unit, Z code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GateOutput(NamedTuple):
    """What a gate scan returns."""

    z: Tensor  # (B, T, Z), integrated code
    gate: Tensor  # (B, T), weight of the proposal in the mix: beta, or 0 and 1 when it is thresholded
    beta: Tensor  # (B, T), switching probability; 1 where a new code was forced


class GateOptions(NamedTuple):
    """How beta is computed from the logit, and the gate from beta; checked in `gate_scan`."""

    temperature: float = 1.0
    threshold: float | None = None  # None: the gate is beta itself
    straight_through: bool = False


def gate_scan_reference(
    drive: Tensor,
    z_tilde: Tensor,
    w_code: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    fresh: Tensor,
    z_initial: Tensor,
    noise: Tensor | None,
    options: GateOptions,
) -> GateOutput:
    """Switching unit and temporal integration (paper eq. 16, 17), step by step; arguments as in `gate_scan`."""
    z = z_initial
    steps = []
    for t in range(drive.shape[1]):
        hidden = torch.relu(drive[:, t] + z @ w_code.T)
        logit = hidden @ w_out + b_out
        if noise is not None:
            logit = logit + noise[:, t]
        beta = torch.sigmoid(logit / options.temperature).masked_fill(fresh[:, t], 1.0)
        gate = gate_from_beta(beta, options)
        z = gate[:, None] * z_tilde[:, t] + (1 - gate[:, None]) * z
        steps.append(GateOutput(z, gate, beta))
    return GateOutput(*(torch.stack(values, dim=1) for values in zip(*steps, strict=True)))


def gate_from_beta(beta: Tensor, options: GateOptions) -> Tensor:
    """Beta itself, or 1 where beta >= threshold and 0 elsewhere; straight-through lets gradients pass to beta."""
    if options.threshold is None:
        return beta
    hard = (beta >= options.threshold).to(beta.dtype)
    # the bracket is exactly zero, so the value stays exactly 0 or 1
    return hard + (beta - beta.detach()) if options.straight_through else hard
