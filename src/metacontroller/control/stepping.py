"""Steering any number of steps, from an episode's start or from where an earlier call ended: module calls and prompts.

Axes: b batch, t steps, n_e residual, n_h history, n_z code, p parameters of a distribution of codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metacontroller.control.codes import bounded
from metacontroller.control.core import control, encode, gate_of_call, read_residual
from metacontroller.control.losses import ratio_loss
from metacontroller.control.modules import SteeringModules
from metacontroller.control.switching import GateConfig, mix_given, regular_switches
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.caches import check_unused
from metacontroller.ranges import shown


@dataclass
class StepState:
    """What a call hands to the next: history (b, n_h): h_t. z (b, n_z): the code. policy: the policy's state. steps:
    taken so far."""

    history: Tensor
    z: Tensor
    policy: Any
    steps: int


class SteeringOutput(NamedTuple):
    """Of one call of a metacontroller.

    prev_hiddens: for the next call. input_residual_stream (b, t, n_e). action_dist (b, t, p): of the encoder in
    discovery, else of the policy. actions (b, t, n_z): proposed at every step. switch_beta (b, t): the weight of the
    proposal. kl_loss, ratio_loss: scalars, weighted; kl_loss_weight: of the KL. z (b, t, n_z): the integrated code.
    """

    prev_hiddens: StepState
    input_residual_stream: Tensor
    action_dist: Tensor
    actions: Tensor
    switch_beta: Tensor
    kl_loss: Tensor
    kl_loss_weight: float
    ratio_loss: Tensor
    z: Tensor

    @property
    def state(self) -> StepState:
        return self.prev_hiddens


class SteeringSteps(SteeringModules):
    """Mixin of `MetaController`: a module call over any number of steps."""

    def _check_state(self, state: Any, kind: type, batch: int) -> None:
        raise NotImplementedError

    def forward(
        self,
        residual_stream: Tensor,
        cache: SteeringOutput | None = None,
        discovery_phase: bool = False,
        hard_switch: bool | None = None,
        hard_switch_straight_through: bool | None = None,
        ablate_switch_beta: Tensor | None = None,
        switch_beta_frequency: int | None = None,
        ablate_offset: int = 0,
        temperature: float = 1.0,
        episode_lens: Tensor | None = None,
    ) -> tuple[Tensor, SteeringOutput]:
        """The control U e (b, t, n_e) for residual_stream (b, t, n_e), and the output from which the next call goes on.

        discovery_phase: codes of the encoder, which sees all steps of this call, and losses; else codes of the policy.
        The gate is used as ``gate.mode`` says, as by `discover` and `act`. hard_switch: whether 1[beta >= threshold] or
        beta mixes codes, for this call, where the gate is learned; its gradient passes straight through if
        hard_switch_straight_through. ablate_switch_beta (b, t): given weights instead of the gate's.
        switch_beta_frequency: a switch at the last of so many steps, counted from ablate_offset. temperature: of the
        codes. episode_lens (b,): real steps, for the losses and the encoder. UserError for shapes that do not fit.
        """
        self.check_residual(residual_stream)
        batch, steps = residual_stream.shape[:2]
        if switch_beta_frequency is not None:
            regular = regular_switches(batch, steps, switch_beta_frequency, ablate_offset)
            ablate_switch_beta = regular.to(residual_stream)
        if ablate_switch_beta is not None:
            ablate_switch_beta = _given_weights(ablate_switch_beta, batch, steps)
        gate = gate_of_call(self, discovery_phase, hard_switch, hard_switch_straight_through)
        if cache is not None and not hasattr(cache, "prev_hiddens"):
            raise UserError(f"cache is {shown(cache)}; expected the output of the call before.")
        state = None if cache is None else cache.prev_hiddens
        self._check_state(state, StepState, batch)
        if discovery_phase or self.policy.every_step:
            lengths = episode_lens if discovery_phase else None
            return self._steer(residual_stream, state, gate, discovery_phase, ablate_switch_beta, temperature, lengths)
        calls, outputs = [], []  # a policy that reads switches alone must know them before it goes on
        for t in range(steps):
            given = None if ablate_switch_beta is None else ablate_switch_beta[:, t : t + 1]
            control, output = self._steer(residual_stream[:, t : t + 1], state, gate, False, given, temperature)
            state = output.prev_hiddens
            calls.append(control)
            outputs.append(output)
        joined = {
            name: torch.cat([getattr(output, name) for output in outputs], 1)
            for name in ("input_residual_stream", "action_dist", "actions", "switch_beta", "z")
        }
        return torch.cat(calls, 1), outputs[-1]._replace(**joined)

    def _steer(
        self,
        residual: Tensor,
        state: StepState | None,
        gate: GateConfig,
        discovery: bool = False,
        given: Tensor | None = None,
        temperature: float = 1.0,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, SteeringOutput]:
        batch, steps = residual.shape[:2]
        taken = 0 if state is None else state.steps
        read, history, last = read_residual(self, residual, None if state is None else state.history)
        policy_state = None if state is None else state.policy
        if discovery:
            whole = residual.new_full((batch,), steps, dtype=torch.long) if lengths is None else lengths
            distribution = encode(self, residual, whole, read, history)
        elif self.policy.every_step:
            check_unused(policy_state, 0 if state is None else state.steps)
            distribution, policy_state = self.policy(self.own(residual), policy_state, keep=True)
        else:
            policy_state = self.policy.initial_state(batch) if policy_state is None else policy_state
            distribution, advanced = self.policy(self.own(residual), policy_state)
        proposed = self.codes.sample(distribution, generator, temperature=temperature)
        proposal = bounded(proposed, self.code_bound)
        z_before = proposal.new_zeros(batch, self.dim_latent) if state is None else state.z
        fresh = torch.zeros(batch, steps, dtype=torch.bool, device=residual.device)
        fresh[:, 0] = state is None
        if given is not None:
            hard = gate.mode not in ("soft", "gumbel-sigmoid")
            weights = (given >= gate.threshold if hard else given).to(proposal)
            z, weight, beta = mix_given(proposal, weights, z_before)
        else:
            z, weight, beta = self.switching(
                read,
                history,
                proposal,
                fresh,
                z_before,
                config=gate,
                temperature=self.switch_temperature,
                steps_before=taken,
            )
        if not discovery and not self.policy.every_step:
            switch = weight >= gate.threshold  # of one step
            policy_state = torch.where(switch, advanced, policy_state)  # pyright: ignore[reportArgumentType, reportCallIssue]
        kl, kl_weight, ratio = self._losses(distribution, beta, lengths, discovery)
        steering = control(self, residual, z).to(residual.dtype)
        done = StepState(last, z[:, -1], policy_state, steps + taken)
        return steering, SteeringOutput(done, residual, distribution, proposed, weight, kl, kl_weight, ratio, z)

    def _losses(
        self, distribution: Tensor, beta: Tensor, lengths: Tensor | None, discovery: bool
    ) -> tuple[Tensor, float, Tensor]:
        """Weighted KL, its weight, and the weighted ratio loss; 0 when acting."""
        zero = distribution.new_zeros(())
        if not discovery:
            return zero, 0.0, zero
        mask = torch.ones_like(beta, dtype=torch.bool) if lengths is None else length_mask(lengths, beta.shape[1])
        weights = self.loss_weights
        kl_weight = 1.0 if weights is None else weights.applied_kl
        ratio_weight = self.ratio_loss_weight if weights is None else weights.current_ratio
        kl = masked_mean(self.codes.kl(distribution), mask) * kl_weight
        if ratio_weight == 0:
            return kl, kl_weight, zero
        ratio = ratio_loss(beta, mask, self.target_segment_length, self.gate_config.threshold, self.ratio_chunk)
        return kl, kl_weight, ratio * ratio_weight


def _given_weights(given: Tensor, batch: int, steps: int) -> Tensor:
    """Given weights as (b, t); (b,) stands for one step. UserError for another shape."""
    given = given[:, None] if given.dim() == 1 else given
    if given.shape != (batch, steps):
        raise UserError(f"ablate_switch_beta has shape {tuple(given.shape)}; expected {(batch, steps)}.")
    return given
