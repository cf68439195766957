"""Losses of the policy over codes on stored episodes; they do not run the frozen model (C.5).

Axes: b batch, t steps, n_e residual, n_z code, entries of a code's log-probability (n_z, or the bits of a word).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metacontroller.control.losses import clipped_surrogate, target_policy_loss
from metacontroller.control.modules import SteeringModules
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.ranges import Positive, check, check_choice
from metacontroller.tensors import check_lengths, check_tensor

Objective = Literal["clipped", "target"]


class PolicyLosses(NamedTuple):
    """surrogate: what the objective minimises. kl: of the policy against the prior, mean over decisions. Scalars."""

    surrogate: Tensor
    kl: Tensor


class StoredDecisions(NamedTuple):
    """What internal RL stores of decisions: states (b, t, n_e), residuals in the type of the policy; actions
    (b, t, n_z), codes; old_log_probs (b, t, entries), or (b, t) of whole codes; advantages (b, t); and which steps are
    decisions, mask (b, t) bool. The policy reads the steps in their order, decisions first."""

    states: Tensor
    actions: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor


class DecisionLosses(NamedTuple):
    """loss: the clipped surrogate, a scalar. log_prob (b, t), or (b, t, entries): of the codes now. distribution
    (b, t, p): of the policy."""

    loss: Tensor
    log_prob: Tensor
    distribution: Tensor


def surrogate_of_decisions(
    modules: SteeringModules, decisions: StoredDecisions, eps_clip: float | tuple[float, float]
) -> DecisionLosses:
    """PPO's clipped surrogate over stored decisions (C.5); only the policy gets a gradient.

    The ratio is that of a code's joint density, as in the paper, where old_log_probs are (b, t); with (b, t, entries)
    each entry has a ratio of its own.
    """
    distribution, _ = modules.policy(decisions.states)
    log_prob = modules.codes.log_prob(distribution, decisions.actions)
    if decisions.old_log_probs.dim() == 2:
        log_prob = log_prob.sum(-1)
    loss = clipped_surrogate(log_prob, decisions.old_log_probs, decisions.advantages, decisions.mask, eps_clip)
    return DecisionLosses(loss, log_prob, distribution)


def policy_losses(
    modules: SteeringModules,
    states: Tensor,
    old_log_probs: Tensor,
    actions: Tensor,
    advantages: Tensor,
    switch_betas: Tensor | None = None,
    episode_lens: Tensor | None = None,
    eps_clip: float | tuple[float, float] | None = None,
    *,
    objective: Objective = "clipped",
    per_entry: bool = False,
    eta: float = 1.0,
    group: int | None = None,
) -> PolicyLosses:
    """The policy's losses over the decisions of stored episodes; only the policy gets a gradient.

    states (b, t, n_e): stored residuals. old_log_probs (b, t, entries), actions (b, t, n_z). advantages (b,), or
    (b, t). switch_betas (b, t): a step is a decision where beta >= threshold, and every step is one without them;
    the state of the paper's policy advances only at decisions. episode_lens (b,): real steps.

    objective "clipped": PPO's surrogate with eps_clip or (below, above). The ratio is that of a code's joint
    density, as in the paper; per_entry: each entry has a ratio of its own, which clips entries one by one and does
    not bound the change of their product. "target": Target Policy Optimization with eta over groups of ``group``
    episodes, whose scores are their mean log-probability a decision, see `losses.target_policy_loss`.
    UserError for shapes that do not fit.
    """
    check_choice("objective", objective, get_args(Objective))
    check("eta", eta, Positive)
    stored = _decisions(modules, states, old_log_probs, actions, advantages, switch_betas, episode_lens)
    if objective == "clipped":
        chosen = stored if per_entry else stored._replace(old_log_probs=stored.old_log_probs.sum(-1))
        clip = modules.eps_clip if eps_clip is None else eps_clip
        loss, _, distribution = surrogate_of_decisions(modules, chosen, clip)
    else:
        if advantages.dim() != 1:
            raise UserError(f"advantages have shape {tuple(advantages.shape)}; expected one an episode, (b,).")
        distribution, _ = modules.policy(stored.states)
        log_prob, count = modules.codes.log_prob(distribution, stored.actions), stored.mask.sum(1).clamp_min(1)
        scores, old_scores = (
            value.sum(-1).masked_fill(~stored.mask, 0.0).sum(1) / count for value in (log_prob, stored.old_log_probs)
        )
        loss = target_policy_loss(scores, old_scores, advantages, eta=eta, group=group)
    return PolicyLosses(loss, masked_mean(modules.codes.kl(distribution), stored.mask))


def policy_loss(
    modules: SteeringModules,
    states: Tensor,
    old_log_probs: Tensor,
    actions: Tensor,
    advantages: Tensor,
    switch_betas: Tensor | None = None,
    episode_lens: Tensor | None = None,
    eps_clip: float | tuple[float, float] | None = None,
) -> Tensor:
    """PPO's clipped surrogate over the switches of stored episodes (C.5); arguments as of `policy_losses`."""
    stored = states, old_log_probs, actions, advantages, switch_betas, episode_lens
    return policy_losses(modules, *stored, eps_clip).surrogate


def log_prob(modules: SteeringModules, action_dist: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of each entry of the codes: (b, t, p), (b, t, n_z) -> (b, t, n_z), or a bit each."""
    check_tensor("action_dist", action_dist)
    check_tensor("actions", actions)
    if actions.shape[-1] != modules.dim_latent or action_dist.shape[-1] != modules.codes.params:
        raise UserError(
            f"action_dist has shape {tuple(action_dist.shape)} and actions {tuple(actions.shape)}; expected last "
            f"axes {modules.codes.params} and {modules.dim_latent}."
        )
    return modules.codes.log_prob(action_dist, actions)


def _decisions(
    modules: SteeringModules,
    states: Tensor,
    old_log_probs: Tensor,
    actions: Tensor,
    advantages: Tensor,
    switch_betas: Tensor | None,
    episode_lens: Tensor | None,
) -> StoredDecisions:
    """The arguments of `policy_losses` without gradients, those of switches first if the policy reads them alone."""
    modules.check_residual(states)
    batch, steps = states.shape[:2]
    if switch_betas is None:
        switch_betas = states.new_ones(batch, steps)
    shapes = {
        "old_log_probs": (old_log_probs, [(batch, steps, modules.codes.entries)]),
        "actions": (actions, [(batch, steps, modules.dim_latent)]),
        "advantages": (advantages, [(batch,), (batch, steps)]),
        "switch_betas": (switch_betas, [(batch, steps)]),
    }
    for name, (value, expected) in shapes.items():
        check_tensor(name, value)
        if value.shape not in expected:
            wanted = " or ".join(map(str, expected))
            raise UserError(f"{name} has shape {tuple(value.shape)}; expected {wanted}, to fit states and codes.")
    check_lengths(episode_lens, batch, steps)
    if not advantages.is_floating_point() or not bool(advantages.isfinite().all()):
        raise UserError(
            f"advantages have dtype {advantages.dtype} and range over {float(advantages.min()):g}.."
            f"{float(advantages.max()):g}; expected finite floating-point numbers."
        )
    switch = switch_betas >= modules.gate_config.threshold
    real = torch.ones_like(switch) if episode_lens is None else length_mask(episode_lens, steps)
    if bool((switch_betas.isnan() & real).any()):
        raise UserError("switch_betas hold NaN; expected numbers from 0 to 1.")
    switch = switch & real
    values = {"states": states.detach(), "actions": actions.detach(), "old_log_probs": old_log_probs.detach()}
    for name, value in values.items():
        if not bool((value.isfinite().all(-1) | ~switch).all()):
            raise UserError(f"{name} hold NaN or infinite values at decisions; expected finite numbers.")
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(-1, steps)
    if not modules.policy.every_step:
        order = torch.argsort((~switch).long(), dim=1, stable=True)  # switches first, in their order
        switch, advantages = switch.gather(1, order), advantages.gather(1, order)
        values = {name: value.gather(1, order[..., None].expand_as(value)) for name, value in values.items()}
    values["states"] = modules.in_weight_dtype(values["states"])
    return StoredDecisions(**values, advantages=advantages, mask=switch)
