"""Losses of discovery and internal RL: pure functions. Axes: b batch, t steps, z code."""

from __future__ import annotations

import torch
from torch import Tensor

from metacontroller.data.trajectories import masked_mean
from metacontroller.errors import UserError
from metacontroller.ranges import Number
from metacontroller.tensors import check_tensor


def gaussian_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, diag std²) || N(0, I)) summed over the code (eq. 3): (..., z) -> (...)."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)


def binary_entropy(p: Tensor) -> Tensor:
    """Entropy of Bernoullis in nats, elementwise; its gradient at 0 and at 1, where the slope is infinite, is 0.

    The first step's gate is exactly 1, and an infinite slope times the zero behind it would be NaN.
    """
    ends = (p == 0) | (p == 1)
    inside = p.masked_fill(ends, 0.5)
    return (torch.special.entr(inside) + torch.special.entr(1 - inside)).masked_fill(ends, 0.0)


def ratio_loss(
    beta: Tensor,
    mask: Tensor,
    target_length: float,
    threshold: float = 0.5,
    chunk: int | None = None,
    hard: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """H-Net's ratio loss (arXiv 2507.07955, eq. 10) towards one switch every ``target_length`` steps.

    With N the target length, F the share of hard switches and G the mean probability:
    N/(N-1) ((N-1) F G + (1-F)(1-G)), which is 1 at F = G = 1/N. beta, mask (b, t) -> scalar.
    chunk: F and G of every ``chunk`` steps of an episode alone, and the mean over chunks, so that no stretch of an
    episode is without switches; steps beyond the last whole chunk do not count. hard (b, t): the hard switches, where
    beta >= threshold if not given. share: F, a scalar, where this is a part of a batch: with the F of the whole the
    loss is linear in G, so that the parts' losses, weighted by their steps, add up to that of the whole.
    UserError for a target length of 1 or less.
    """
    if target_length <= 1:
        raise UserError(f"target_length is {target_length}; expected more than 1 step a segment.")
    n = target_length
    hard = beta >= threshold if hard is None else hard
    switched = hard.to(beta.dtype)
    if chunk is not None and beta.shape[1] >= 2 * chunk:
        covered = beta.shape[1] // chunk * chunk
        beta, switched, mask = (values[:, :covered].reshape(-1, chunk) for values in (beta, switched, mask))
        real = mask.any(1)  # chunks that hold a real step
        weight = mask[real].to(beta.dtype)
        steps = weight.sum(1)
        share, soft = ((values[real] * weight).sum(1) / steps for values in (switched, beta))
        return (n / (n - 1) * ((n - 1) * share * soft + (1 - share) * (1 - soft))).mean()
    share = masked_mean(switched, mask) if share is None else share
    soft = masked_mean(beta, mask)
    return n / (n - 1) * ((n - 1) * share * soft + (1 - share) * (1 - soft))


def trajectory_advantages(returns: Tensor, delta: float = 1e-3) -> Tensor:
    """(R - mean of batch) / (std of batch + delta), (b,) -> (b,): the same for all switches of an episode (C.5).

    Zeros where all returns are equal, whatever delta is.
    """
    check_tensor("returns", returns)
    advantages = (returns - returns.mean()) / (returns.std(correction=0) + delta)
    return torch.where(returns.max() == returns.min(), torch.zeros_like(advantages), advantages)


MAX_LOG_RATIO = 20.0
"""Bound of log-ratios before ``exp``, far beyond any clipping: the loss and its gradient stay finite."""


def log_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """log(pi / pi_old), (b, t) each, within ±`MAX_LOG_RATIO`; 0 where mask (b, t) is false."""
    return (log_prob - old_log_prob).masked_fill(~mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def z_score(values: Tensor, dim: int | None = None, eps: float = 1e-8) -> Tensor:
    """(x - mean) / (std + eps) of all entries or along ``dim``, with the sample's standard deviation; same shape."""
    if dim is None:
        return (values - values.mean()) / (values.std() + eps)
    return (values - values.mean(dim, keepdim=True)) / (values.std(dim, keepdim=True) + eps)


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    eps_clip: float | tuple[float, float] = 0.2,
) -> Tensor:
    """PPO's clipped surrogate to minimise, a mean over real decisions (C.5); tensors (b, t), mask bool -> scalar.

    eps_clip: of the ratio, or (below 1, above 1), such as Clip-Higher (DAPO, arXiv 2503.14476, section 3.1). With
    log-probabilities (b, t, entries) each entry of a code has a ratio of its own, and their terms are summed; the
    paper's ratio is that of the code's joint density, one a decision.
    """
    pair = (eps_clip, eps_clip) if isinstance(eps_clip, (int, float)) else tuple(eps_clip)
    if len(pair) != 2 or any(Number(0).expected(bound) for bound in pair):
        raise UserError(f"eps_clip is {eps_clip}; expected a finite number of at least 0, or two (below, above).")
    low, high = pair
    decided, per_entry = mask, log_prob.dim() == 3
    if per_entry:
        decided, advantage = mask[..., None], advantage[..., None]
    ratio = torch.exp(log_ratio(log_prob, old_log_prob, decided))
    clipped = ratio.clamp(1 - low, 1 + high)
    terms = torch.minimum(ratio * advantage, clipped * advantage)
    return -masked_mean(terms.sum(-1) if per_entry else terms, mask)


def target_policy_loss(
    scores: Tensor, old_scores: Tensor, advantages: Tensor, *, eta: float = 1.0, group: int | None = None
) -> Tensor:
    """Target Policy Optimization (arXiv 2604.06159, section 2) over groups of episodes that share a start.

    scores, old_scores (b,): log-probability of each episode under the policy and under the one that acted, up to a
    constant of the group. With p the softmax of scores over a group, the target is q = softmax(log p_old + u / eta), u
    the advantages (b,), and the loss is the cross-entropy -sum q log p, a mean over groups: its gradient in the scores
    is (p - q) / number of groups. group: episodes in one, which lie side by side; all if None. UserError unless eta is
    positive and b is a multiple of ``group``.
    """
    group = len(scores) if group is None else group
    if group < 1 or len(scores) % group:
        raise UserError(f"{len(scores)} episodes do not divide into groups of {group}.")
    old, new, u = (values.view(-1, group) for values in (old_scores, scores, advantages))
    return cross_entropy(new.log_softmax(-1), policy_target(old, u, eta).detach())


def policy_target(old_scores: Tensor, advantages: Tensor, eta: float = 1.0) -> Tensor:
    """q = softmax(log softmax(old_scores) + u / eta) along the last axis, u the advantages (`target_policy_loss`)."""
    if eta <= 0:
        raise UserError(f"eta is {eta}; expected a number above 0.")
    return (old_scores.log_softmax(-1) + advantages / eta).softmax(-1)


def cross_entropy(log_p: Tensor, q: Tensor) -> Tensor:
    """-sum q log p along the last axis, a mean over the others; a scalar."""
    return -(q * log_p).sum(-1).mean()
