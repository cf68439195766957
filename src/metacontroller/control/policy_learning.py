"""Losses of the policy over codes on stored episodes; they do not run the frozen model (C.5).

Axes: b batch, t steps, n_e residual, n_z code, entries of a code's log-probability (n_z, or the bits of a word).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metacontroller.control.codes import Codes
from metacontroller.control.evolution import evolve
from metacontroller.control.losses import clipped_surrogate, target_policy_loss
from metacontroller.control.switching import GateConfig
from metacontroller.data.trajectories import check_lengths, check_tensor, length_mask, masked_mean
from metacontroller.errors import UserError
from metacontroller.ranges import POSITIVE, check_choice, check_number

Objective = Literal["clipped", "target"]


class PolicyLosses(NamedTuple):
    """surrogate: what the objective minimises. kl: of the policy against the prior, mean over decisions. Scalars."""

    surrogate: Tensor
    kl: Tensor


class _Decisions(NamedTuple):
    """The policy at stored steps: distribution (b, t, p), log_prob and old (b, t, entries), advantage (b, t), and which
    steps are decisions, mask (b, t) bool."""

    distribution: Tensor
    log_prob: Tensor
    old: Tensor
    advantage: Tensor
    mask: Tensor


class PolicyLearning:
    """Mixin of `MetaController`: what trains its policy."""

    policy: Any
    codes: Codes
    dim_latent: int
    eps_clip: float
    gate_config: GateConfig

    def _check_residual(self, residual: Tensor) -> None:
        raise NotImplementedError

    def own(self, residual: Tensor) -> Tensor:
        raise NotImplementedError

    def log_prob(self, action_dist: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each entry of the codes: (b, t, p), (b, t, n_z) -> (b, t, n_z), or a bit each."""
        check_tensor("action_dist", action_dist)
        check_tensor("actions", actions)
        if actions.shape[-1] != self.dim_latent or action_dist.shape[-1] != self.codes.params:
            raise UserError(
                f"action_dist has shape {tuple(action_dist.shape)} and actions {tuple(actions.shape)}; expected last "
                f"axes {self.codes.params} and {self.dim_latent}."
            )
        return self.codes.log_prob(action_dist, actions)

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
        """PPO's clipped surrogate over the switches of stored episodes (C.5); see `policy_losses`."""
        stored = states, old_log_probs, actions, advantages, switch_betas, episode_lens
        return self.policy_losses(*stored, eps_clip).surrogate

    def policy_losses(
        self,
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
        check_number("eta", eta, POSITIVE)
        decided = self._decisions(states, old_log_probs, actions, advantages, switch_betas, episode_lens)
        kl = masked_mean(self.codes.kl(decided.distribution), decided.mask)
        if objective == "target":
            if advantages.dim() != 1:
                raise UserError(f"advantages have shape {tuple(advantages.shape)}; expected one an episode, (b,).")
            count = decided.mask.sum(1).clamp_min(1)
            scores, old_scores = (
                value.sum(-1).masked_fill(~decided.mask, 0.0).sum(1) / count
                for value in (decided.log_prob, decided.old)
            )
            return PolicyLosses(target_policy_loss(scores, old_scores, advantages, eta=eta, group=group), kl)
        log_prob, old = decided.log_prob, decided.old
        if not per_entry:
            log_prob, old = log_prob.sum(-1), old.sum(-1)
        clip = self.eps_clip if eps_clip is None else eps_clip
        return PolicyLosses(clipped_surrogate(log_prob, old, decided.advantage, decided.mask, clip), kl)

    def _decisions(
        self,
        states: Tensor,
        old_log_probs: Tensor,
        actions: Tensor,
        advantages: Tensor,
        switch_betas: Tensor | None,
        episode_lens: Tensor | None,
    ) -> _Decisions:
        self._check_residual(states)
        batch, steps = states.shape[:2]
        stored = {"old_log_probs": old_log_probs, "actions": actions, "advantages": advantages}
        for name, value in (stored | {"switch_betas": switch_betas}).items():
            check_tensor(name, value, none=name == "switch_betas")
        for name, value, entries in (
            ("old_log_probs", old_log_probs, self.codes.entries),
            ("actions", actions, self.dim_latent),
        ):
            if value.shape != (batch, steps, entries):
                raise UserError(
                    f"{name} has shape {tuple(value.shape)}; expected {(batch, steps, entries)}, to fit states and n_z."
                )
        if switch_betas is None:
            switch_betas = states.new_ones(batch, steps)
        if switch_betas.shape != (batch, steps) or advantages.shape not in ((batch,), (batch, steps)):
            raise UserError(
                f"switch_betas has shape {tuple(switch_betas.shape)} and advantages {tuple(advantages.shape)}; "
                f"expected {(batch, steps)}, and {(batch,)} or {(batch, steps)}."
            )
        check_lengths(episode_lens, batch, steps)
        if not advantages.is_floating_point() or not bool(advantages.isfinite().all()):
            raise UserError(
                f"advantages have dtype {advantages.dtype} and range over {float(advantages.min()):g}.."
                f"{float(advantages.max()):g}; expected finite floating-point numbers."
            )
        switch = switch_betas >= self.gate_config.threshold
        real = torch.ones_like(switch) if episode_lens is None else length_mask(episode_lens, steps)
        if bool((switch_betas.isnan() & real).any()):
            raise UserError("switch_betas hold NaN; expected numbers from 0 to 1.")
        switch = switch & real
        states, actions, old = states.detach(), actions.detach(), old_log_probs.detach()
        for name, value in (("states", states), ("actions", actions), ("old_log_probs", old)):
            if not bool((value.isfinite().all(-1) | ~switch).all()):
                raise UserError(f"{name} hold NaN or infinite values at decisions; expected finite numbers.")
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand(-1, steps)
        if not self.policy.every_step:
            order = torch.argsort((~switch).long(), dim=1, stable=True)  # switches first, in their order
            switch, wide = switch.gather(1, order), order[..., None]
            states, actions, old = (value.gather(1, wide.expand_as(value)) for value in (states, actions, old))
            advantages = advantages.gather(1, order)
        distribution, _ = self.policy(self.own(states))
        return _Decisions(distribution, self.codes.log_prob(distribution, actions), old, advantages, switch)

    def evolve_policy(
        self, model: Any, num_generations: int, environment: Callable[[Any], Any], **options: Any
    ) -> Tensor:
        """Trains the policy by evolution strategies instead of gradients, see `control.evolution`.

        environment(model) -> fitness, a number: plays with the model, which holds this metacontroller.
        """
        return evolve(self.policy, lambda: environment(model), num_generations, **options)
