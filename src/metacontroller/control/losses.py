"""Losses of discovery and internal RL: pure functions. Axes: b batch, t steps, z code."""

from __future__ import annotations

import torch
from torch import Tensor

from metacontroller.data.trajectories import masked_mean
from metacontroller.errors import UserError


def gaussian_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, diag std²) || N(0, I)) summed over the code (eq. 3): (..., z) -> (...)."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)


def ratio_loss(beta: Tensor, mask: Tensor, target_length: float, threshold: float = 0.5) -> Tensor:
    """H-Net's ratio loss (arXiv 2507.07955, eq. 10) towards one switch every ``target_length`` steps.

    With N the target length, F the share of hard switches and G the mean probability:
    N/(N-1) ((N-1) F G + (1-F)(1-G)), which is 1 at F = G = 1/N. beta, mask (b, t) -> scalar. UserError for a
    target length of 1 or less.
    """
    if target_length <= 1:
        raise UserError(f"target_length is {target_length}; expected more than 1 step a segment.")
    n = target_length
    hard = masked_mean((beta >= threshold).to(beta.dtype), mask)
    soft = masked_mean(beta, mask)
    return n / (n - 1) * ((n - 1) * hard * soft + (1 - hard) * (1 - soft))


def trajectory_advantages(returns: Tensor, delta: float = 1e-3) -> Tensor:
    """(R - mean of batch) / (std of batch + delta), (b,) -> (b,): the same for all switches of an episode (C.5).

    Zeros where all returns are equal, whatever delta is.
    """
    advantages = (returns - returns.mean()) / (returns.std(correction=0) + delta)
    return torch.where(returns.max() == returns.min(), torch.zeros_like(advantages), advantages)


MAX_LOG_RATIO = 20.0
"""Bound of log-ratios before ``exp``, far beyond any clipping: the loss and its gradient stay finite."""


def log_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """log(pi / pi_old), (b, t) each, within ±`MAX_LOG_RATIO`; 0 where mask (b, t) is false."""
    return (log_prob - old_log_prob).masked_fill(~mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, eps_clip: float = 0.2
) -> Tensor:
    """PPO's clipped surrogate to minimise, a mean over real decisions (C.5); tensors (b, t), mask bool -> scalar."""
    ratio = torch.exp(log_ratio(log_prob, old_log_prob, mask))
    clipped = ratio.clamp(1 - eps_clip, 1 + eps_clip)
    return -masked_mean(torch.minimum(ratio * advantage, clipped * advantage), mask)
