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

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metacontroller.control.codes import bounded
from metacontroller.control.modules import SteeringModules
from metacontroller.control.switching import GateConfig, at_random_steps, mix_given
from metacontroller.data.trajectories import check_lengths, length_mask
from metacontroller.errors import UserError
from metacontroller.models.precision import products
from metacontroller.ranges import COUNT, check_number


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
    Under `parameter_groups.fixed_gate` no gradient passes through beta, to the codes before neither. UserError for
    shapes that do not fit.
    """
    lengths, noise = _checked(modules, residual, episode_lens, noise)
    read, history, _ = read_residual(modules, residual)
    distribution = encode(modules, residual if embedded_residual is None else embedded_residual, lengths, read, history)
    first = (torch.arange(residual.shape[1], device=residual.device) == 0).expand(len(residual), -1)
    if teacher_codes is not None:
        drawn = at_random_steps(history, noise.gate, lengths)
        z, gate, beta = modules.switching.held(read, drawn, teacher_codes, first)
    else:
        z_tilde = bounded(modules.codes.sample(distribution, noise=noise.code), modules.code_bound)
        options = {"config": gate_of_call(modules, discovery=True), "temperature": modules.switch_temperature}
        learns = any(parameter.requires_grad for parameter in modules.switching.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            z, gate, beta = modules.switching(read, history, z_tilde, first, uniform=noise.gate, **options)
        if z_tilde.requires_grad and not learns:
            z = mix_given(z_tilde, gate).z
    mask = length_mask(lengths, residual.shape[1])
    steered = steer(modules, residual, z)
    return DiscoveryOutput(steered, z, gate, beta, modules.codes.kl(distribution), mask, distribution)


def sample_noise(
    modules: SteeringModules, batch: int, steps: int, generator: torch.Generator | None = None
) -> DiscoveryNoise:
    """Noise for `discover` on ``batch`` episodes of ``steps`` steps."""
    check_number("batch", batch, COUNT)
    weight = modules.policy.readout.weight
    options = {"generator": generator, "device": weight.device}
    precise = torch.promote_types(weight.dtype, torch.float32)
    code = torch.randn(batch, steps, modules.codes.noise_dim, dtype=precise, **options)
    return DiscoveryNoise(code, torch.rand(batch, steps, **options))


def read_residual(
    modules: SteeringModules, residual: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What gate and encoder read of residuals (b, t, n_e), after the history ``before`` (b, n_h), zero at an episode's
    start: residuals normed (b, t, n_e), h_{t-1} (b, t, n_h), and h_t of the last step (b, n_h) (eq. 12)."""
    read = modules.norm(modules.own(residual))
    start = read.new_zeros(len(read), modules.history.hidden_size) if before is None else before
    after, last = modules.history(read, start[None].contiguous())
    return read, torch.cat([start[:, None], after[:, :-1]], 1), last[0]


def encode(modules: SteeringModules, embedded: Tensor, lengths: Tensor, read: Tensor, history: Tensor) -> Tensor:
    """The encoder's distributions (b, t, p) (eq. 13 to 15).

    embedded (b, t or t + 1, n_e): what the sequence embedder reads of episodes with ``lengths`` (b,) actions.
    """
    steps, entries = read.shape[1], embedded.shape[1]
    modules.check_residual(embedded)
    if entries not in (steps, steps + 1):
        raise UserError(f"embedded_residual has {entries} steps; expected {steps}, as the residual, or one more.")
    residual = modules.own(embedded)
    with products(modules.precision, residual):
        sequence = modules.sequence_embedder(modules.norm(residual), length_mask(lengths + entries - steps, entries))
    sequence = sequence.to(residual.dtype)
    sequence = sequence[:, None].expand(-1, steps, -1) if sequence.dim() == 2 else sequence[:, :steps]
    proposal = modules.encoder(torch.cat([read, history, sequence], -1))
    return proposal.to(torch.promote_types(proposal.dtype, torch.float32))


def control(modules: SteeringModules, residual: Tensor, z: Tensor) -> Tensor:
    """U e (eq. 18)."""
    read = modules.own(residual)
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
        return replace(config, mode="straight-through" if straight_through else "hard")
    noisy = discovery and config.mode == "gumbel-sigmoid"
    return config if noisy else replace(config, mode="soft")


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
