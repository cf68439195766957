"""Steering: reads the residual stream, decides when to switch, steers with a linear controller (paper D.2).

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

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.control.codes import bounded
from metacontroller.control.modules import SteeringModules
from metacontroller.control.policy import gru_step
from metacontroller.control.switching import ALL_OR_NOTHING, GateConfig, GateMode, at_random_steps, mix_given, weight_of
from metacontroller.data.trajectories import length_mask
from metacontroller.errors import UserError
from metacontroller.models.precision import products
from metacontroller.ranges import Count, Whole, check
from metacontroller.tensors import check_lengths


@dataclass
class SteeringState:
    """What steering carries from step to step; one row per episode.

    history (b, n_h): h_t of the last step. z (b, n_z): the code in force. steps_since_switch (b,) int64: 0 before the
    first step of an episode, which must take a new code. policy: the state of what proposes codes; (b, s) of a policy
    that reads switches alone, where it advances only at these.
    """

    history: Tensor
    z: Tensor
    steps_since_switch: Tensor
    policy: Any

    def index(self, rows: Tensor) -> SteeringState:
        """The state of the episodes with indices ``rows`` (m,)."""
        return SteeringState(*(None if value is None else value[rows] for value in vars(self).values()))  # pyright: ignore[reportArgumentType]


class Reading(NamedTuple):
    """What is read of a span: residual (b, t, n_e) in the type of the weights; normed (b, t, n_e); history
    (b, t, n_h): h_{t-1}; last (b, n_h): h_t of the last step."""

    residual: Tensor
    normed: Tensor
    history: Tensor
    last: Tensor


class Proposal(NamedTuple):
    """code (b, t, n_z); distribution (b, t, p), or None; state: the proposer's, after the span."""

    code: Tensor
    distribution: Any
    state: Any


class Proposer(NamedTuple):
    """Who says what the next code is.

    ask(reading, state, switch) -> `Proposal`; state: of `SteeringState.policy`; switch (b,) bool: where a single step
    switches, None for more steps. at_switches: whether proposals depend on the switches before them, so that a span is
    steered step by step.
    """

    ask: Callable[..., Proposal]
    at_switches: bool = False


class SteeredSpan(NamedTuple):
    """control (b, t, n_e): U e. z (b, t, n_z): the integrated code. gate (b, t): the weight of the proposal in it. beta
    (b, t): the switching probability. proposed (b, t, n_z). distribution (b, t, p), of the proposals, or None. state:
    after the span."""

    control: Tensor
    z: Tensor
    gate: Tensor
    beta: Tensor
    proposed: Tensor
    distribution: Any
    state: SteeringState


class GateUse(NamedTuple):
    """How a span uses the gate. config: see `gate_of_call`. uniform (b, t): noise in (0, 1) for the Gumbel-sigmoid,
    sampled if not given. weights (b, t): of the proposals, instead of the gate's."""

    config: GateConfig
    uniform: Tensor | None = None
    weights: Tensor | None = None

    def step(self, t: int) -> GateUse:
        """That of one step."""
        return GateUse(self.config, *(None if part is None else part[:, t : t + 1] for part in self[1:]))


def steer_span(
    modules: SteeringModules, residual: Tensor, state: SteeringState, proposer: Proposer, gate: GateUse
) -> SteeredSpan:
    """Eq. 12 to 18 along residuals (b, t, n_e), which follow the steps of ``state``.

    Where the gate's parameters are frozen (`parameter_groups.fixed_gate`) no gradient passes through beta, to the codes
    before neither.
    """
    if residual.shape[1] == 1:
        return _one_step(modules, residual, state, proposer, gate)
    if not proposer.at_switches:
        return _many_steps(modules, residual, state, proposer, gate)
    spans: list[SteeredSpan] = []
    for t in range(residual.shape[1]):
        spans.append(_one_step(modules, residual[:, t : t + 1], state, proposer, gate.step(t)))
        state = spans[-1].state
    fields: Any = zip(*(span[:-1] for span in spans), strict=True)
    return SteeredSpan(*(torch.cat(values, 1) for values in fields), state=state)


def _many_steps(
    modules: SteeringModules, residual: Tensor, state: SteeringState, proposer: Proposer, gate: GateUse
) -> SteeredSpan:
    """All proposals, then one scan over time."""
    reading = read_residual(modules, residual, state.history)
    proposal = proposer.ask(reading, state.policy, None)
    z_tilde = bounded(proposal.code, modules.code_bound)
    before, since = state.z.to(z_tilde.dtype), state.steps_since_switch
    if gate.weights is not None:
        z, weight, beta = mix_given(z_tilde, gate.weights.to(z_tilde.dtype), before)
    else:
        fresh = torch.zeros(residual.shape[:2], dtype=torch.bool, device=residual.device)
        fresh[:, 0] = since == 0
        options = {"config": gate.config, "temperature": modules.switch_temperature, "since": since}
        learns = _gate_learns(modules)
        with torch.set_grad_enabled(learns):
            parts = (reading.normed, reading.history, z_tilde, fresh, before, gate.uniform)
            z, weight, beta = modules.switching(*parts, **options)
        if z_tilde.requires_grad and not learns:
            z = mix_given(z_tilde, weight, before).z
    steps = residual.shape[1]
    number = torch.arange(1, steps + 1, device=residual.device)
    last = torch.where(weight >= gate.config.threshold, number, 0).amax(1)
    since = torch.where(last > 0, steps + 1 - last, since + steps)
    after = SteeringState(reading.last, z[:, -1], since, proposal.state)
    return SteeredSpan(control(modules, residual, z), z, weight, beta, *proposal[:2], after)


def _one_step(
    modules: SteeringModules, residual: Tensor, state: SteeringState, proposer: Proposer, gate: GateUse
) -> SteeredSpan:
    """The gate first, which knows the code before, then the proposal."""
    reading = read_residual(modules, residual, state.history)
    all_or_nothing = gate.weights is None and gate.config.mode in ALL_OR_NOTHING
    if gate.weights is None:
        with torch.set_grad_enabled(_gate_learns(modules)):
            beta = _step_beta(modules, reading, state, gate)
            weight = beta if all_or_nothing else weight_of(beta, gate.config)
    else:
        beta = weight = gate.weights[:, 0]
    switch = weight >= gate.config.threshold
    proposal = proposer.ask(reading, state.policy, switch)
    z_tilde = bounded(proposal.code[:, 0], modules.code_bound)
    if all_or_nothing:
        weight, z = switch.to(beta.dtype), torch.where(switch[:, None], z_tilde, state.z)
    else:
        z = weight[:, None] * z_tilde + (1 - weight[:, None]) * state.z
    after = SteeringState(reading.last, z, _steps_since(state, switch), proposal.state)
    steering = control(modules, residual[:, 0], z)[:, None]
    return SteeredSpan(steering, z[:, None], weight[:, None], beta[:, None], *proposal[:2], after)


# the two halves of a step, for callers who are asked for the code between them


def observe(modules: SteeringModules, residual: Tensor, state: SteeringState) -> tuple[Tensor, SteeringState]:
    """Reads residual (b, n_e): beta (b,), 1 at an episode's first step, and the state with the history h_t."""
    reading = read_residual(modules, residual[:, None], state.history)
    beta = _step_beta(modules, reading, state, GateUse(acting_gate(modules)))
    return beta, SteeringState(reading.last, state.z, state.steps_since_switch, state.policy)


def integrate(state: SteeringState, switch: Tensor, code: Tensor) -> SteeringState:
    """The state after the step that was observed (eq. 17): where switch (b,) bool is true, the code becomes ``code``
    (b, n_z)."""
    z = torch.where(switch[:, None], code, state.z)
    return SteeringState(state.history, z, _steps_since(state, switch), state.policy)


def _steps_since(state: SteeringState, switch: Tensor) -> Tensor:
    return torch.where(switch, 1, state.steps_since_switch + 1)


def _step_beta(modules: SteeringModules, reading: Reading, state: SteeringState, gate: GateUse) -> Tensor:
    """Eq. 16 of one step, (b,)."""
    since, uniform = state.steps_since_switch, None if gate.uniform is None else gate.uniform[:, 0]
    asked = (reading.normed[:, 0], state.history, state.z, since, uniform)
    beta = modules.switching.probability(*asked, config=gate.config, temperature=modules.switch_temperature)
    return beta.masked_fill(since == 0, 1.0)


def _gate_learns(modules: SteeringModules) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in modules.switching.parameters())


def initial_state(modules: SteeringModules, batch: int, policy: Any = None) -> SteeringState:
    """The state before the first step of ``batch`` episodes; policy: the state of what proposes codes."""
    check("batch", batch, Whole(0))
    weight = modules.norm.weight
    since = torch.zeros(batch, dtype=torch.long, device=weight.device)
    history, z = (weight.new_zeros(batch, width) for width in (modules.dim_history, modules.dim_latent))
    return SteeringState(history, z, since, policy)


# who proposes


def encoder(
    modules: SteeringModules,
    embedded: Tensor,
    lengths: Tensor,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Proposer:
    """The acausal encoder (eq. 13 to 15), which sees all of ``embedded``, see `encode`. noise: of the codes."""

    def ask(reading: Reading, state: Any, switch: Tensor | None) -> Proposal:
        distribution = encode(modules, embedded, lengths, reading)
        return Proposal(modules.codes.sample(distribution, noise=noise, temperature=temperature), distribution, state)

    return Proposer(ask)


def policy(modules: SteeringModules, generator: torch.Generator | None = None, temperature: float = 1.0) -> Proposer:
    """The policy of internal RL: one that reads switches alone, or every step (`variants.proposers`)."""
    every_step = modules.policy.every_step

    def ask(reading: Reading, state: Any, switch: Tensor | None) -> Proposal:
        if every_step:
            distribution, after = modules.policy(reading.residual, state, keep=True)
        else:
            before = modules.policy.initial_state(len(reading.residual)) if state is None else state
            distribution, advanced = modules.policy(reading.residual, before)
            after = advanced if switch is None else torch.where(switch[:, None], advanced, before)
        code = modules.codes.sample(distribution, generator, temperature=temperature)
        return Proposal(code, distribution, after)

    return Proposer(ask, at_switches=not every_step)


# the parts


def read_residual(modules: SteeringModules, residual: Tensor, before: Tensor | None = None) -> Reading:
    """What gate, encoder and policy read of residuals (b, t, n_e), after the history ``before`` (b, n_h), zero at an
    episode's start (eq. 12)."""
    residual = modules.in_weight_dtype(residual)
    normed = modules.norm(residual)
    start = normed.new_zeros(len(normed), modules.history.hidden_size) if before is None else before
    if normed.shape[1] == 1:
        return Reading(residual, normed, start[:, None], gru_step(modules.history, normed[:, 0], start))
    after, last = modules.history(normed, start[None].contiguous())
    return Reading(residual, normed, torch.cat([start[:, None], after[:, :-1]], 1), last[0])


def encode(modules: SteeringModules, embedded: Tensor, lengths: Tensor, reading: Reading) -> Tensor:
    """The encoder's distributions (b, t, p) (eq. 13 to 15).

    embedded (b, t or t + 1, n_e): what the sequence embedder reads of episodes with ``lengths`` (b,) actions.
    """
    steps, entries = reading.normed.shape[1], embedded.shape[1]
    modules.check_residual(embedded)
    if entries not in (steps, steps + 1):
        raise UserError(f"embedded_residual has {entries} steps; expected {steps}, as the residual, or one more.")
    residual = modules.in_weight_dtype(embedded)
    with products(modules.precision, residual):
        sequence = modules.sequence_embedder(modules.norm(residual), length_mask(lengths + entries - steps, entries))
    sequence = sequence.to(residual.dtype)
    sequence = sequence[:, None].expand(-1, steps, -1) if sequence.dim() == 2 else sequence[:, :steps]
    proposal = modules.encoder(torch.cat([reading.normed, reading.history, sequence], -1))
    return proposal.to(torch.promote_types(proposal.dtype, torch.float32))


def beta_along(modules: SteeringModules, normed: Tensor, history: Tensor, z: Tensor) -> Tensor:
    """Eq. 16 along given codes z (b, t, n_z): how likely a switch is at each step, after the code of the one before,
    (b, t); the first step has no meaning. normed, history: of `Reading`."""
    before = F.pad(z, (0, 0, 1, -1))
    return modules.switching.probability(normed, history, before, torch.ones_like(before[..., 0]))


def control(modules: SteeringModules, residual: Tensor, z: Tensor) -> Tensor:
    """U e (eq. 18)."""
    read = modules.in_weight_dtype(residual)
    with products(modules.precision, read):
        return modules.controller(z.to(read.dtype), read)


def steer(modules: SteeringModules, residual: Tensor, z: Tensor) -> Tensor:
    """e + U e (eq. 11), in the type of the residual; where U is 0, e to the bit."""
    return (residual + control(modules, residual, z)).to(residual.dtype)


def gate_of_call(
    modules: SteeringModules, discovery: bool, hard: bool | None = None, straight_through: bool | None = None
) -> GateConfig:
    """The gate as a call uses it: hard when acting, in discovery as it is configured, unless a learned gate is told
    otherwise by arguments or attributes."""
    config = modules.gate_config
    if config.mode in ("forced", "fixed-frequency"):
        return config
    hard = modules.hard_switch if hard is None else hard
    if hard is None:
        hard = not discovery or config.mode in ("hard", "straight-through")
    if straight_through is None:
        straight_through = modules.straight_through or config.mode == "straight-through"
    if hard:
        return _in_mode(config, "straight-through" if straight_through else "hard")
    noisy = discovery and config.mode == "gumbel-sigmoid"
    return config if noisy else _in_mode(config, "soft")


def acting_gate(modules: SteeringModules) -> GateConfig:
    """The gate of acting: hard (C.6), and without noise."""
    return gate_of_call(modules, discovery=False, hard=True, straight_through=False)


@cache
def _in_mode(config: GateConfig, mode: GateMode) -> GateConfig:
    return replace(config, mode=mode)


# discovery over whole episodes


class DiscoveryNoise(NamedTuple):
    """code (b, t, n_z), of binary codes (b, t, bits): standard normal.

    gate (b, t): uniform in (0, 1), used by the Gumbel-sigmoid gate and, under teacher-forced codes, to draw histories
    for it.
    """

    code: Tensor
    gate: Tensor


class DiscoveryOutput(NamedTuple):
    """Result of `discover` for a batch of episodes.

    steered (b, t, n_e): e + U e. z (b, t, n_z): the integrated code. gate (b, t): the weight of the proposal in it.
    beta (b, t): the switching probability. kl (b, t): KL of the proposal against the prior, at every step. mask (b, t)
    bool: real steps. distribution (b, t, p): parameters of the proposal, see `control.codes`; mean and log_std
    (b, t, n_z), of Gaussian codes, are its halves.
    """

    steered: Tensor
    z: Tensor
    gate: Tensor
    beta: Tensor
    kl: Tensor
    mask: Tensor
    distribution: Tensor

    @property
    def mean(self) -> Tensor:
        return self.distribution.chunk(2, -1)[0]

    @property
    def log_std(self) -> Tensor:
        return self.distribution.chunk(2, -1)[1]


def discover(
    modules: SteeringModules,
    residual: Tensor,
    episode_lens: Tensor | None = None,
    noise: DiscoveryNoise | None = None,
    *,
    embedded_residual: Tensor | None = None,
    teacher_codes: Tensor | None = None,
) -> DiscoveryOutput:
    """Proposes, integrates and steers over whole episodes (eq. 12 to 18).

    residual (b, t, n_e). episode_lens (b,): real steps. noise: sampled here if not given. embedded_residual
    (b, t or t + 1, n_e): what the sequence embedder reads instead of the residual, if given; entry t + 1 is the
    observation after the last action. teacher_codes (b, t, n_z): codes that steer instead of the integrated proposals;
    gate and beta are then how likely a switch is after the code of the step before, with the histories of random steps.
    UserError for shapes that do not fit.
    """
    lengths, noise = _checked(modules, residual, episode_lens, noise)
    embedded = residual if embedded_residual is None else embedded_residual
    mask = length_mask(lengths, residual.shape[1])
    if teacher_codes is not None:
        reading = read_residual(modules, residual)
        distribution = encode(modules, embedded, lengths, reading)
        beta = beta_along(modules, reading.normed, at_random_steps(reading.history, noise.gate, lengths), teacher_codes)
        beta = torch.cat([torch.ones_like(beta[:, :1]), beta[:, 1:]], 1)
        steered, kl = steer(modules, residual, teacher_codes), modules.codes.kl(distribution)
        return DiscoveryOutput(steered, teacher_codes, beta, beta, kl, mask, distribution)
    start, proposer = initial_state(modules, len(residual)), encoder(modules, embedded, lengths, noise.code)
    span = steer_span(modules, residual, start, proposer, GateUse(gate_of_call(modules, True), noise.gate))
    steered, kl = (residual + span.control).to(residual.dtype), modules.codes.kl(span.distribution)
    return DiscoveryOutput(steered, span.z, span.gate, span.beta, kl, mask, span.distribution)


def sample_noise(
    modules: SteeringModules, batch: int, steps: int, generator: torch.Generator | None = None
) -> DiscoveryNoise:
    """Noise for `discover` on ``batch`` episodes of ``steps`` steps."""
    check("batch", batch, Count)
    weight = modules.policy.readout.weight
    options = {"generator": generator, "device": weight.device}
    precise = torch.promote_types(weight.dtype, torch.float32)
    code = torch.randn(batch, steps, modules.codes.noise_dim, dtype=precise, **options)
    return DiscoveryNoise(code, torch.rand(batch, steps, **options))


def _checked(
    modules: SteeringModules, residual: Tensor, episode_lens: Tensor | None, noise: DiscoveryNoise | None
) -> tuple[Tensor, DiscoveryNoise]:
    """Lengths (b,) and noise, those that are not given; UserError for shapes that do not fit."""
    modules.check_residual(residual)
    batch, steps = residual.shape[:2]
    check_lengths(episode_lens, batch, steps, wait=False)
    if noise is not None and noise.gate.shape != (batch, steps):
        raise UserError(
            f"noise is for (episodes, steps) {tuple(noise.gate.shape)}; expected {(batch, steps)}, as the residual."
        )
    lengths = residual.new_full((batch,), steps, dtype=torch.long) if episode_lens is None else episode_lens
    return lengths, sample_noise(modules, batch, steps) if noise is None else noise
