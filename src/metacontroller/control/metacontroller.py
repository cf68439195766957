"""The metacontroller (paper D.2): its modules and settings, and the methods that call the functions of this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.control import core, discovery_losses, policy_losses
from metacontroller.control.codes import bounded
from metacontroller.control.core import DiscoveryNoise, DiscoveryOutput
from metacontroller.control.parameter_groups import trains_only, without
from metacontroller.control.policy import gru_step
from metacontroller.control.policy_losses import PolicyLosses
from metacontroller.control.population import evolve
from metacontroller.control.stepping import SteeringSteps, StepState
from metacontroller.errors import UserError
from metacontroller.models.protocol import DiscoveryLosses, SteerableModel
from metacontroller.ranges import Whole, check_number, shown


@dataclass
class ControlState:
    """What the metacontroller carries from step to step while acting; one row per episode.

    history (b, n_h): h_{t-1}. z (b, n_z): the current code. held (b,) int64: steps since the last switch. started (b,)
    bool: false before the first step, which must take a new code. policy (b, s): the policy's recurrent state, which
    advances only at switches.
    """

    history: Tensor
    z: Tensor
    held: Tensor
    started: Tensor
    policy: Tensor

    def index(self, rows: Tensor) -> ControlState:
        """The state of the episodes with indices ``rows`` (m,)."""
        return ControlState(*(value[rows] for value in vars(self).values()))


class MetaControllerOutput(NamedTuple):
    """One acting step.

    action_dist (b, 1, p): the policy's distribution, of Gaussian codes mean and log standard deviation. actions
    (b, 1, n_z): the current code. switch_beta (b, 1). input_residual_stream (b, 1, n_e): what the policy read. state:
    for the next step.
    """

    action_dist: Tensor
    actions: Tensor
    switch_beta: Tensor
    input_residual_stream: Tensor
    state: ControlState


class MetaController(SteeringSteps):
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

    # phase 2: discovery

    def discover(
        self,
        residual: Tensor,
        episode_lens: Tensor | None = None,
        noise: DiscoveryNoise | None = None,
        **options: Any,
    ) -> DiscoveryOutput:
        """Proposes, integrates and steers along residuals (b, t, n_e); arguments as of `core.discover`."""
        return core.discover(self, residual, episode_lens, noise, **options)

    def sample_noise(self, batch: int, steps: int, generator: torch.Generator | None = None) -> DiscoveryNoise:
        """Noise for ``discover`` on ``batch`` episodes of ``steps`` steps."""
        return core.sample_noise(self, batch, steps, generator)

    def discovery_loss(
        self,
        model: SteerableModel,
        states: Tensor,
        actions: Tensor,
        episode_lens: Tensor | None = None,
        *,
        with_state_loss: bool = True,
    ) -> DiscoveryLosses:
        """The losses of eq. 3; UserError for a batch that does not fit the model."""
        batch = states, actions, episode_lens
        return discovery_losses.discovery_loss(self, model, *batch, with_state_loss=with_state_loss)

    # phase 3: acting with abstract actions

    def initial_state(self, batch: int) -> ControlState:
        """The state before the first step of ``batch`` episodes."""
        check_number("batch", batch, Whole(0))
        weight = self.policy.readout.weight
        return ControlState(
            history=weight.new_zeros(batch, self.dim_history),
            z=weight.new_zeros(batch, self.dim_latent),
            held=torch.zeros(batch, dtype=torch.long, device=weight.device),
            started=torch.zeros(batch, dtype=torch.bool, device=weight.device),
            policy=self.policy.initial_state(batch),
        )

    def observe(self, residual: Tensor, state: ControlState) -> tuple[Tensor, Tensor]:
        """Reads residual (b, n_e); returns beta (b,), 1 at an episode's first step, and the next history (b, n_h)."""
        read = self.norm(self.own(residual))
        beta = self.switching.probability(read, state.history, state.z, state.held)
        beta = torch.where(state.started, beta, torch.ones_like(beta))
        return beta, gru_step(self.history, read, state.history)

    def integrate(self, state: ControlState, history: Tensor, switch: Tensor, proposed: Tensor) -> ControlState:
        """The state after a step (eq. 17): where switch (b,) bool is true, the code becomes proposed (b, n_z)."""
        return ControlState(
            history=history,
            z=torch.where(switch[:, None], proposed, state.z),
            held=torch.where(switch, 1, state.held + 1),
            started=torch.ones_like(state.started),
            policy=state.policy,
        )

    def steer(self, residual: Tensor, z: Tensor) -> Tensor:
        """e + U e (eq. 11), in the type of the residual; where U is 0, e to the bit."""
        return core.steer(self, residual, z)

    def act(self, residual: Tensor, state: Any = None, generator: torch.Generator | None = None) -> tuple[Tensor, Any]:
        """One acting step: residual (b, 1, n_e) -> steered residual (b, 1, n_e) and `MetaControllerOutput`.

        The switch is hard (beta >= threshold, C.6). The policy's distribution is returned at every step, but its state
        and the code change only at switches. A policy that reads every step has a state of its own, and an output as of
        a module call.
        """
        self.check_residual(residual)
        if residual.shape[1] != 1:
            raise UserError(f"the residual stream has {residual.shape[1]} steps; expected 1: act takes one at a time.")
        self._check_state(state, StepState if self.policy.every_step else ControlState, len(residual))
        if self.policy.every_step:
            control, output = self._steer(
                residual, state, core.gate_of_call(self, False, True, False), generator=generator
            )
            return residual + control, output
        state = self.initial_state(len(residual)) if state is None else state
        beta, history = self.observe(residual[:, 0], state)
        switch = beta >= self.gate_config.threshold
        distribution, advanced = self.policy(self.own(residual), state.policy)
        proposed = bounded(self.codes.sample(distribution[:, 0], generator), self.code_bound)
        next_state = self.integrate(state, history, switch, proposed)
        next_state.policy = torch.where(switch[:, None], advanced, state.policy)
        output = MetaControllerOutput(distribution, next_state.z[:, None], beta[:, None], residual, next_state)
        return self.steer(residual, next_state.z[:, None]), output

    def _check_state(self, state: Any, kind: type, batch: int) -> None:
        """UserError unless a state, if there is one, is one of this metacontroller's for so many episodes."""
        if state is None:
            return
        if not isinstance(state, kind):
            raise UserError(f"the state is {shown(state)}; expected the one that the last step returned.")
        found, own = (state.history.shape[-1], state.z.shape[-1]), (self.dim_history, self.dim_latent)
        if found != own:
            raise UserError(
                f"the state is of another metacontroller: its histories and codes have the widths {found}; expected "
                f"{own}."
            )
        if len(state.history) != batch:
            raise UserError(f"the state has {len(state.history)} episodes; expected {batch}, as the residual.")

    # internal RL

    def log_prob(self, action_dist: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each entry of the codes: (b, t, p), (b, t, n_z) -> (b, t, n_z), or a bit each."""
        return policy_losses.log_prob(self, action_dist, actions)

    def policy_loss(
        self,
        states: Tensor,
        old_log_probs: Tensor,
        actions: Tensor,
        advantages: Tensor,
        switch_betas: Tensor | None = None,
        episode_lens: Tensor | None = None,
        eps_clip: float | tuple[float, float] | None = None,
    ) -> Tensor:
        """PPO's clipped surrogate over the switches of stored episodes (C.5); see ``policy_losses``."""
        stored = states, old_log_probs, actions, advantages, switch_betas, episode_lens
        return policy_losses.policy_losses(self, *stored, eps_clip).surrogate

    def policy_losses(self, *stored: Any, **options: Any) -> PolicyLosses:
        """Surrogate and KL of the policy on stored episodes; arguments as of `policy_losses.policy_losses`."""
        return policy_losses.policy_losses(self, *stored, **options)

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
