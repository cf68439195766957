"""The metacontroller (paper D.2): its modules and settings, and the methods that call the functions of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.control import core, discovery_losses, policy_losses
from metacontroller.control.core import SteeredSpan, SteeringState
from metacontroller.control.losses import ratio_loss
from metacontroller.control.modules import SteeringModules
from metacontroller.control.parameter_groups import trains_only, without
from metacontroller.control.population import evolve
from metacontroller.control.switching import regular_switches
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.ranges import shown


class MetaControllerOutput(NamedTuple):
    """Of one acting step, or of a module call.

    prev_hiddens, also ``state``: for the next call. input_residual_stream (b, t, n_e). action_dist (b, t, p): of the
    encoder in discovery, else of the policy. actions (b, t, n_z): proposed at every step; of an acting step, the code
    in force. switch_beta (b, t): the weight of the proposal; of an acting step, beta. kl_loss, ratio_loss: scalars,
    weighted, 0 when acting; kl_loss_weight: of the KL. z (b, t, n_z): the integrated code.
    """

    prev_hiddens: SteeringState
    input_residual_stream: Tensor
    action_dist: Tensor
    actions: Tensor
    switch_beta: Tensor
    kl_loss: Tensor
    kl_loss_weight: float
    ratio_loss: Tensor
    z: Tensor

    @property
    def state(self) -> SteeringState:
        return self.prev_hiddens


class MetaController(SteeringModules):
    """The metacontroller (paper D.2).

    dim_model: n_e. dim_latent: n_z; with code "binary" the number of bits, and a code is a one-hot vector of
    2^dim_latent entries, of which ``free_bits`` bits a step cost no KL (see `control.codes`). dim_meta_controller:
    default of the widths dim_history (n_h), dim_sequence (n_s), encoder_hidden, policy_hidden and embedder_dim.
    embedder_kind, policy_kind: "attention" and "gru", or "hawk", the paper's SSM. rank: of the controller, None for
    full. policy_std: standard deviation of the policy's Gaussian codes before it learns. action_temperature: of the
    frozen model's actions while codes steer it in a world, 0 for the likeliest. gate: GateConfig or its fields as a
    dict. ratio_loss_weight: of the optional H-Net loss towards one switch every ``target_segment_length`` steps.
    eps_clip: of the policy loss. precision: of the matrix products in the sequence embedder and the controller, which
    dominate the cost; gate, KL and policy are computed in float32.
    UserError for values out of range.
    """

    # what these compute is in the modules named; each takes the metacontroller as its first argument

    discover = core.discover
    sample_noise = core.sample_noise
    discovery_loss = discovery_losses.discovery_loss
    observe = core.observe
    integrate = staticmethod(core.integrate)
    steer = core.steer
    log_prob = policy_losses.log_prob
    policy_loss = policy_losses.policy_loss
    policy_losses = policy_losses.policy_losses

    def initial_state(self, batch: int) -> SteeringState:
        """The state before the first step of ``batch`` episodes; UserError for a policy that reads every step."""
        return core.initial_state(self, batch, self.policy.initial_state(batch))

    def act(
        self, residual: Tensor, state: SteeringState | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, MetaControllerOutput]:
        """One acting step: residual (b, 1, n_e) -> steered residual (b, 1, n_e) and `MetaControllerOutput`.

        The switch is hard (beta >= threshold, C.6). The policy's distribution is returned at every step, but the code,
        and the state of a policy that reads switches alone, change only at switches. Of a policy that reads every step
        the output is as of a module call.
        """
        self.check_residual(residual)
        if residual.shape[1] != 1:
            raise UserError(f"the residual stream has {residual.shape[1]} steps; expected 1: act takes one at a time.")
        state, gate = self._state(state, len(residual)), core.GateUse(core.acting_gate(self))
        span = core.steer_span(self, residual, state, core.policy(self, generator), gate)
        output = self._output(residual, span, None)
        if not self.policy.every_step:
            output = output._replace(actions=span.z, switch_beta=span.beta)
        return (residual + span.control).to(residual.dtype), output

    # any number of steps

    def forward(
        self,
        residual_stream: Tensor,
        cache: MetaControllerOutput | None = None,
        discovery_phase: bool = False,
        hard_switch: bool | None = None,
        hard_switch_straight_through: bool | None = None,
        ablate_switch_beta: Tensor | None = None,
        switch_beta_frequency: int | None = None,
        ablate_offset: int = 0,
        temperature: float = 1.0,
        episode_lens: Tensor | None = None,
    ) -> tuple[Tensor, MetaControllerOutput]:
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
        if cache is not None and not hasattr(cache, "prev_hiddens"):
            raise UserError(f"cache is {shown(cache)}; expected the output of the call before.")
        state = self._state(None if cache is None else cache.prev_hiddens, batch)
        gate = core.gate_of_call(self, discovery_phase, hard_switch, hard_switch_straight_through)
        given = ablate_switch_beta
        if switch_beta_frequency is not None:
            given = regular_switches(batch, steps, switch_beta_frequency, ablate_offset)
        if given is not None:
            given = _given_weights(given, batch, steps).to(residual_stream)
            given = given if gate.mode in ("soft", "gumbel-sigmoid") else (given >= gate.threshold).to(given.dtype)
        lengths = residual_stream.new_full((batch,), steps, dtype=torch.long) if episode_lens is None else episode_lens
        proposer = core.policy(self, temperature=temperature)
        if discovery_phase:
            proposer = core.encoder(self, residual_stream, lengths, temperature=temperature)
        span = core.steer_span(self, residual_stream, state, proposer, core.GateUse(gate, weights=given))
        output = self._output(residual_stream, span, lengths if discovery_phase else None)
        return span.control.to(residual_stream.dtype), output

    def _state(self, state: SteeringState | None, batch: int) -> SteeringState:
        """The given state, or that of an episode's start; UserError unless it is one of this metacontroller's for so
        many episodes."""
        if state is None:
            return core.initial_state(self, batch)
        if not isinstance(state, SteeringState):
            raise UserError(f"the state is {shown(state)}; expected the one that the last step returned.")
        widths, expected = (state.history.shape[-1], state.z.shape[-1]), (self.dim_history, self.dim_latent)
        if widths != expected:
            raise UserError(
                f"the state is of another metacontroller: its histories and codes have the widths {widths}; expected "
                f"{expected}."
            )
        if len(state.history) != batch:
            raise UserError(f"the state has {len(state.history)} episodes; expected {batch}, as the residual.")
        return state

    def _output(self, residual: Tensor, span: SteeredSpan, lengths: Tensor | None) -> MetaControllerOutput:
        """What a call returns; lengths (b,): of episodes in discovery, where there are losses."""
        kl_weight, kl = 0.0, span.z.new_zeros(())
        ratio = kl
        if lengths is not None:
            weights, mask = self.loss_weights, length_mask(lengths, residual.shape[1])
            kl_weight = 1.0 if weights is None else weights.applied_kl
            kl = masked_mean(self.codes.kl(span.distribution), mask) * kl_weight
            ratio_weight = self.ratio_loss_weight if weights is None else weights.current_ratio
            if ratio_weight != 0:
                target, threshold = self.target_segment_length, self.gate_config.threshold
                ratio = ratio_loss(span.beta, mask, target, threshold, self.ratio_chunk) * ratio_weight
        read = (residual, span.distribution, span.proposed, span.gate)
        return MetaControllerOutput(span.state, *read, kl, kl_weight, ratio, span.z)

    def evolve_policy(
        self, model: Any, num_generations: int, environment: Callable[[Any], Any], **options: Any
    ) -> Tensor:
        """Trains the policy by evolution strategies instead of gradients, see `control.population`.

        environment(model) -> fitness, a number: plays with the model, which holds this metacontroller.
        """
        return evolve(self.policy, lambda: environment(model), num_generations, **options)

    # which parameters a phase trains

    def discovery_parameters(self) -> list[nn.Parameter]:
        """The parameters that discovery trains: all but the policy's."""
        return without(self, self.policy)

    def internal_rl_parameters(self) -> list[nn.Parameter]:
        """The parameters that internal RL trains: the policy's."""
        return list(self.policy.parameters())

    def discovery_parameters_switching_unit(self) -> list[nn.Parameter]:
        """Those of the gate."""
        return list(self.switching.parameters())

    def discovery_parameters_non_switching(self) -> list[nn.Parameter]:
        """Those that discovery trains, without the gate's."""
        return without(self, self.policy, self.switching)

    def train_discovery(self) -> None:
        """Training mode; all but the policy requires a gradient."""
        self.train()
        trains_only(self, self.discovery_parameters())

    def train_internal_rl(self, eval_rest: bool = False) -> None:
        """Training mode of the policy, which alone requires a gradient; eval_rest: evaluation mode of all else."""
        if eval_rest:
            self.eval()
        self.policy.train()
        trains_only(self, self.internal_rl_parameters())


def _given_weights(given: Tensor, batch: int, steps: int) -> Tensor:
    """Given weights as (b, t); (b,) stands for one step. UserError for another shape."""
    given = given[:, None] if given.dim() == 1 else given
    if given.shape != (batch, steps):
        raise UserError(f"ablate_switch_beta has shape {tuple(given.shape)}; expected {(batch, steps)}.")
    return given
