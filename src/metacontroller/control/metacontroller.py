"""The metacontroller: reads the residual stream, decides when to switch, steers with a linear controller (paper D.2).

    h_t = GRU(e_t, h_{t-1})                                   (12)   history
    s = embed(e_1:T)                                          (13)   acausal, discovery only
    z~_t ~ N(mu_t, Sigma_t) = f_enc(e_t, h_{t-1}, s)          (14, 15)
    beta_t = f_switch(e_t, h_{t-1}, z_{t-1})                  (16)   causal
    z_t = beta_t z~_t + (1 - beta_t) z_{t-1}                  (17)
    e_t <- e_t + f_hyp(z_t) e_t                               (11, 18)

Axes: b batch, t steps, n_e residual, n_h history, n_s sequence embedding, n_z code. The paper is silent on how e is
scaled before it is read; ours passes through a layer norm. U multiplies the residual itself. Where it is known, the
sequence embedder also reads the observation after the last action: our choice.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.control.codes import CodeKind, bounded, make_codes
from metacontroller.control.controller import Controller
from metacontroller.control.discovery import DiscoveryNoise, DiscoveryOutput, EpisodeDiscovery
from metacontroller.control.freezing import ParameterGroups
from metacontroller.control.policy import AbstractActionPolicy, PolicyKind, gru_step
from metacontroller.control.policy_learning import PolicyLearning
from metacontroller.control.sequence_embedder import EmbedderKind, SequenceEmbedder
from metacontroller.control.stepping import SteeringSteps, StepState
from metacontroller.control.switching import GateConfig, SwitchingUnit, at_random_steps, mix_given
from metacontroller.data.trajectories import check_lengths, check_tensor, length_mask
from metacontroller.errors import UserError
from metacontroller.models.other_keywords import own_keywords
from metacontroller.models.precision import Precision, check_precision, products
from metacontroller.models.protocol import frozen
from metacontroller.ranges import (
    COUNT,
    DEPTH,
    MOST_WIDTH,
    NOT_NEGATIVE,
    POSITIVE,
    WIDTH,
    Number,
    Whole,
    check_number,
    check_options,
    shown,
)
from metacontroller.storage.module_file import Saveable


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


class MetaController(EpisodeDiscovery, PolicyLearning, SteeringSteps, ParameterGroups, Saveable, nn.Module):
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

    @own_keywords
    def __init__(
        self,
        dim_model: int,
        *,
        dim_meta_controller: int = 256,
        dim_latent: int = 128,
        code: CodeKind = "gaussian",
        free_bits: float = 0.0,
        dim_history: int | None = None,
        dim_sequence: int | None = None,
        encoder_hidden: int | None = None,
        decoder_hidden: int = 32,
        decoder_depth: int = 1,
        switch_hidden: int = 32,
        policy_hidden: int | None = None,
        policy_std: float = 1.0,
        action_temperature: float = 1.0,
        embedder_dim: int | None = None,
        embedder_depth: int = 1,
        embedder_kind: EmbedderKind = "attention",
        policy_kind: PolicyKind = "gru",
        rank: int | None = 16,
        gate: GateConfig | dict[str, Any] | None = None,
        ratio_loss_weight: float = 0.0,
        target_segment_length: float = 4.0,
        eps_clip: float = 0.2,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        self.remember_arguments(
            locals(),
            {"code": "gaussian", "free_bits": 0.0, "decoder_depth": 1, "policy_std": 1.0, "action_temperature": 1.0},
        )
        check_precision(precision)
        widths = {"dim_model": dim_model, "dim_meta_controller": dim_meta_controller}
        more = {"dim_history": dim_history, "dim_sequence": dim_sequence, "encoder_hidden": encoder_hidden}
        more |= {"policy_hidden": policy_hidden, "embedder_dim": embedder_dim, "rank": rank}
        for name, value in (widths | {"dim_latent": dim_latent, "switch_hidden": switch_hidden}).items():
            check_number(name, value, WIDTH)
        for name, value in more.items():
            check_number(name, value, Whole(0 if name != "rank" else -MOST_WIDTH, MOST_WIDTH, none=True))
        check_number("embedder_depth", embedder_depth, DEPTH)
        check_number("ratio_loss_weight", ratio_loss_weight, NOT_NEGATIVE)
        if Number().expected(target_segment_length) or target_segment_length <= 1:
            raise UserError(f"target_segment_length is {target_segment_length}; expected more than 1 step.")
        check_number("eps_clip", eps_clip, POSITIVE)
        check_number("action_temperature", action_temperature, NOT_NEGATIVE)
        if not isinstance(gate, GateConfig):
            check_options("gate", gate or {}, GateConfig)
        width = dim_meta_controller
        n_h, n_s = dim_history or width, dim_sequence or width
        self.codes = make_codes(code, dim_latent, free_bits)
        self.dim_model, self.dim_latent, self.dim_history = dim_model, self.codes.dim, n_h
        self.gate_config = gate if isinstance(gate, GateConfig) else GateConfig(**(gate or {}))
        self.ratio_loss_weight, self.target_segment_length = ratio_loss_weight, target_segment_length
        self.eps_clip, self.action_temperature = eps_clip, action_temperature
        self.loss_weights = None
        self.precision: Precision = precision

        self.norm = nn.LayerNorm(dim_model)
        self.history = nn.GRU(dim_model, n_h, batch_first=True)
        self.sequence_embedder = SequenceEmbedder(
            dim_model, n_s, dim=embedder_dim or width, depth=embedder_depth, kind=embedder_kind
        )
        self.encoder = nn.Sequential(
            nn.Linear(dim_model + n_h + n_s, encoder_hidden or width),
            nn.ReLU(),
            nn.Linear(encoder_hidden or width, self.codes.params),
        )
        self.switching = SwitchingUnit(dim_model, n_h, self.dim_latent, hidden=switch_hidden, config=self.gate_config)
        self.controller = Controller(self.dim_latent, dim_model, hidden=decoder_hidden, rank=rank, depth=decoder_depth)
        self.policy = AbstractActionPolicy(
            dim_model, self.dim_latent, hidden=policy_hidden or width, kind=policy_kind, params=self.codes.params
        )
        with torch.no_grad():
            self.policy.readout.bias.copy_(self.codes.start(policy_std))

    # phase 2: discovery

    def discover(
        self,
        residual: Tensor,
        episode_lens: Tensor | None = None,
        noise: DiscoveryNoise | None = None,
        *,
        embedded_residual: Tensor | None = None,
        held: Tensor | None = None,
        fixed_gate: bool = False,
    ) -> DiscoveryOutput:
        """Proposes, integrates and steers over whole episodes (eq. 12 to 18).

        residual (b, t, n_e). episode_lens (b,): real steps. noise: sampled here if not given. embedded_residual
        (b, t or t + 1, n_e): what the sequence embedder reads instead of the residual, if given; entry t + 1 is the
        observation after the last action. held (b, t, n_z): codes that steer instead of the integrated proposals; the
        gate is then asked with the histories of random steps. fixed_gate: nothing that beta depends on, given residuals
        and codes, gets a gradient: not the gate, nor norm and history, which it reads; the codes that it mixes have
        theirs. UserError for shapes that do not fit.
        """
        self._check_residual(residual)
        batch, steps = residual.shape[:2]
        check_lengths(episode_lens, batch, steps, wait=False)
        if noise is not None and noise.gate.shape != (batch, steps):
            raise UserError(
                f"noise is for (episodes, steps) {tuple(noise.gate.shape)}; expected {(batch, steps)}, as the residual."
            )
        lengths = residual.new_full((batch,), steps, dtype=torch.long) if episode_lens is None else episode_lens
        mask = length_mask(lengths, steps)
        embedded = residual if embedded_residual is None else embedded_residual
        with frozen(nn.ModuleList([self.norm, self.history])) if fixed_gate else nullcontext():
            read, history, _ = self.read(residual)
            distribution = self._propose(embedded, lengths, read, history)
        noise = self.sample_noise(batch, steps) if noise is None else noise
        z_tilde = bounded(self.codes.sample(distribution, noise=noise.code), self.code_bound)
        first = (torch.arange(steps, device=residual.device) == 0).expand(batch, -1)
        if held is not None:
            z, gate, beta = self.switching.held(read, at_random_steps(history, noise.gate, lengths), held, first)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not fixed_gate):
                options = {"config": self._gate_of_call(discovery=True), "temperature": self.switch_temperature}
                z, gate, beta = self.switching(read, history, z_tilde, first, uniform=noise.gate, **options)
            if fixed_gate:
                z = mix_given(z_tilde, gate).z
        steered = self.steer(residual, z)
        return DiscoveryOutput(steered, z, gate, beta, self.codes.kl(distribution), mask, distribution)

    def sample_noise(self, batch: int, steps: int, generator: torch.Generator | None = None) -> DiscoveryNoise:
        """Noise for ``discover`` on ``batch`` episodes of ``steps`` steps."""
        check_number("batch", batch, COUNT)
        weight = self.policy.readout.weight
        options = {"generator": generator, "device": weight.device}
        precise = torch.promote_types(weight.dtype, torch.float32)
        code = torch.randn(batch, steps, self.codes.noise_dim, dtype=precise, **options)
        return DiscoveryNoise(code, torch.rand(batch, steps, **options))

    def _embed_sequence(self, residual: Tensor, lengths: Tensor, steps: int) -> Tensor:
        """s (b, n_s) from the residuals (b, steps or steps + 1, n_e) of episodes with ``lengths`` (b,) actions."""
        self._check_residual(residual)
        entries = residual.shape[1]
        if entries not in (steps, steps + 1):
            raise UserError(f"embedded_residual has {entries} steps; expected {steps}, as the residual, or one more.")
        residual = self.own(residual)
        with products(self.precision, residual):
            embedded = self.sequence_embedder(self.norm(residual), length_mask(lengths + entries - steps, entries))
        return embedded.to(residual.dtype)

    def own(self, residual: Tensor) -> Tensor:
        """A residual in the type of the metacontroller's weights, whatever that of the model is."""
        return residual.to(self.norm.weight.dtype)

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
        return (residual + self._control(residual, z)).to(residual.dtype)

    def _control(self, residual: Tensor, z: Tensor) -> Tensor:
        """U e (eq. 18)."""
        read = self.own(residual)
        with products(self.precision, read):
            return self.controller(z.to(read.dtype), read)

    def act(self, residual: Tensor, state: Any = None, generator: torch.Generator | None = None) -> tuple[Tensor, Any]:
        """One acting step: residual (b, 1, n_e) -> steered residual (b, 1, n_e) and `MetaControllerOutput`.

        The switch is hard (beta >= threshold, C.6). The policy's distribution is returned at every step, but its state
        and the code change only at switches. A policy that reads every step has a state of its own, and an output as of
        a module call.
        """
        self._check_residual(residual)
        if residual.shape[1] != 1:
            raise UserError(f"the residual stream has {residual.shape[1]} steps; expected 1: act takes one at a time.")
        self._check_state(state, StepState if self.policy.every_step else ControlState, len(residual))
        if self.policy.every_step:
            control, output = self._steer(residual, state, self._gate_of_call(False, True, False), generator=generator)
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

    def _check_residual(self, residual: Tensor) -> None:
        check_tensor("the residual stream", residual)
        if not residual.is_floating_point():
            raise UserError(f"the residual stream has dtype {residual.dtype}; expected a floating-point one.")
        if residual.dim() != 3 or residual.shape[-1] != self.dim_model or 0 in residual.shape:
            raise UserError(
                f"the residual stream has shape {tuple(residual.shape)}; expected (batch, time, {self.dim_model}) "
                "with at least one episode and one step."
            )
