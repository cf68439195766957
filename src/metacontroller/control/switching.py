"""Switching unit and temporal integration (eq. 16, 17): when to take a new code. The only sequential computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.kernels.gate_scan import GateOutput, gate_scan
from metacontroller.kernels.gate_scan_reference import GateOptions, gate_from_beta
from metacontroller.kernels.linear_scan import linear_scan
from metacontroller.ranges import Count, Number, Positive, check_fields

GateMode = Literal["soft", "hard", "straight-through", "gumbel-sigmoid", "forced", "fixed-frequency"]


ALL_OR_NOTHING = ("hard", "forced", "fixed-frequency")
"""Modes whose weights are 0 or 1, and give no gradient to beta."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How the switching gate beta is used. UserError for values out of range."""

    mode: GateMode = "soft"
    """How beta mixes codes.
    soft: by beta itself (the paper). hard: by 1[beta >= threshold].
    straight-through: hard forward, soft backward.
    gumbel-sigmoid: logistic noise in training (the paper's rate-distortion curves).
    forced: 1 at every step. fixed-frequency: 1 every period steps."""
    threshold: Annotated[float, Number(0, 1, above=True, below=True)] = 0.5
    """A step counts as a switch where beta is at least this (C.6: 0.5)."""
    temperature: Positive = 1.0
    """Divides the logit of gumbel-sigmoid."""
    period: Count = 4
    """Steps from one switch to the next, for fixed-frequency."""

    def __post_init__(self) -> None:
        check_fields(self)


class SwitchingUnit(nn.Module):
    """beta_t = f_switch(e_t, h_{t-1}, z_{t-1}), one hidden layer with ReLU; causal (eq. 16).

    The projections of e and h are computed before the loop over time; the loop carries only z.
    """

    def __init__(self, dim_model: int, dim_history: int, dim_latent: int, *, hidden: int, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        self.drive = nn.Linear(dim_model + dim_history, hidden)
        self.code = nn.Linear(dim_latent, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)

    def forward(
        self,
        residual: Tensor,
        history: Tensor,
        z_tilde: Tensor,
        fresh: Tensor,
        z_initial: Tensor | None = None,
        uniform: Tensor | None = None,
        *,
        config: GateConfig | None = None,
        temperature: float | None = None,
        since: Tensor | None = None,
    ) -> GateOutput:
        """Integrates the proposals over time (eq. 16, 17).

        residual (b, t, n_e). history (b, t, n_h): h_{t-1}. z_tilde (b, t, n_z): proposals. fresh (b, t) bool: steps
        that must take a new code, such as the first of an episode. z_initial (b, n_z): code held before the first step.
        Returns z (b, t, n_z), gate (b, t), the weight of the proposal, and beta (b, t), the switching probability.
        uniform, config, temperature: as of ``probability``. since (b,): steps since the last switch, at the first step;
        0, of an episode's start, if not given.
        """
        config = self.config if config is None else config
        if config.mode in ("forced", "fixed-frequency"):
            period = 1 if config.mode == "forced" else config.period
            since = torch.zeros_like(fresh[:, 0], dtype=torch.long) if since is None else since
            first = (period - since).clamp_min(0) * (since > 0)
            steps = torch.arange(fresh.shape[1], device=fresh.device) - first[:, None]
            due = (steps >= 0) & (steps % period == 0)
            return hold_between(z_tilde, fresh | due, z_initial)
        return gate_scan(
            self.drive(torch.cat([residual, history], -1)),
            z_tilde,
            self.code.weight,
            self.out.weight[0],
            self.out.bias[0],
            fresh=fresh,
            z_initial=z_initial,
            noise=self._noise(residual, config, uniform),
            temperature=self._temperature() if temperature is None else temperature,
            threshold=config.threshold if config.mode in ("hard", "straight-through") else None,
            straight_through=config.mode == "straight-through",
        )

    def probability(
        self,
        residual: Tensor,
        history: Tensor,
        z: Tensor,
        since: Tensor,
        uniform: Tensor | None = None,
        *,
        config: GateConfig | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """Eq. 16 where the code before is known, as in acting; beta (...).

        residual (..., n_e). history (..., n_h): h_{t-1}. z (..., n_z): z_{t-1}. since (...): steps since the last
        switch, which fixed-frequency asks for. config, temperature: for this call; the temperature divides the logit in
        every mode. uniform (...): in training, noise in (0, 1) for the Gumbel-sigmoid, sampled here if not given.
        """
        config = self.config if config is None else config
        if config.mode == "forced":
            return torch.ones_like(z[..., 0])
        if config.mode == "fixed-frequency":
            return (since >= config.period).to(z.dtype)
        hidden = torch.relu(self.drive(torch.cat([residual, history], -1)) + self.code(z))
        logit, noise = self.out(hidden)[..., 0], self._noise(residual, config, uniform)
        logit = logit if noise is None else logit + noise
        return torch.sigmoid(logit / (self._temperature() if temperature is None else temperature))

    def _noise(self, residual: Tensor, config: GateConfig, uniform: Tensor | None) -> Tensor | None:
        """Logistic noise (...) of the Gumbel-sigmoid in training."""
        if config.mode != "gumbel-sigmoid" or not self.training:
            return None
        uniform = torch.rand(residual.shape[:-1], device=residual.device) if uniform is None else uniform
        return torch.logit(uniform.clamp(1e-6, 1 - 1e-6)).to(residual.dtype)

    def _temperature(self) -> float:
        return self.config.temperature if self.config.mode == "gumbel-sigmoid" else 1.0


def weight_of(beta: Tensor, config: GateConfig) -> Tensor:
    """The weight of the proposal from beta (...), as ``config.mode`` says."""
    threshold = config.threshold if config.mode in ("hard", "straight-through") else None
    return gate_from_beta(beta, GateOptions(1.0, threshold, config.mode == "straight-through"))


def at_random_steps(history: Tensor, uniform: Tensor, lengths: Tensor) -> Tensor:
    """At each step the history of a random step of its episode: (b, t, n_h), from uniform (b, t) in 0..1.

    Where codes are given, nothing is left to be found out about when one ends, and a gate that reads what came before
    learns which transitions there are; then it does not open after others.
    """
    steps = (uniform.to(history.device) * lengths[:, None]).long().clamp(max=history.shape[1] - 1)
    return history.gather(1, steps[..., None].expand_as(history))


def mix_given(z_tilde: Tensor, beta: Tensor, z_initial: Tensor | None = None) -> GateOutput:
    """Eq. 17 for given weights beta (b, t) in 0..1 of the proposals (b, t, n_z), after z_initial (b, n_z) or zeros."""
    retained = (1 - beta)[..., None].expand_as(z_tilde)
    return GateOutput(linear_scan(retained, beta[..., None] * z_tilde, z_initial), beta, beta)


def regular_switches(batch: int, steps: int, period: int, offset: int = 0) -> Tensor:
    """(batch, steps) of 0 and 1: the last of every ``period`` steps is a switch; ``offset`` steps came before.

    UserError for a period below 1.
    """
    if period < 1:
        raise UserError(f"the period of switches is {period}; expected at least 1 step.")
    due = (torch.arange(steps) + offset + 1) % period == 0
    return due.to(torch.get_default_dtype()).expand(batch, -1)


def hold_between(z_tilde: Tensor, switch: Tensor, z_initial: Tensor | None = None) -> GateOutput:
    """Eq. 17 for given switches (b, t) bool: each step holds the proposal of the last switch, or z_initial (b, n_z)."""
    steps = torch.arange(switch.shape[1], device=switch.device)
    last = torch.where(switch, steps, -1).cummax(1).values
    z = z_tilde.gather(1, last.clamp_min(0)[..., None].expand_as(z_tilde))
    before = torch.zeros_like(z[:, :1]) if z_initial is None else z_initial[:, None]
    gate = switch.to(z_tilde.dtype)
    return GateOutput(torch.where((last >= 0)[..., None], z, before), gate, gate)
