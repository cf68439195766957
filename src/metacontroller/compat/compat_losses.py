"""Losses of the policy over codes under the other library's names, and what they need; see `control.losses`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from metacontroller.control import losses as ours
from metacontroller.control.metacontroller import MetaController as OurMetaController
from metacontroller.control.policy_losses import policy_losses
from metacontroller.control.switching import regular_switches
from metacontroller.data.trajectories import length_mask

from .compat_names import on_device_of


class GRPOOutput(NamedTuple):
    """What internal RL stores of a step: (b, 1, n_e), (b, 1, n_z), (b, 1, entries), (b, 1)."""

    state: Tensor
    action: Tensor
    log_prob: Tensor
    switch_beta: Tensor


def policy_loss(
    meta_controller: OurMetaController,
    state: Tensor,
    old_log_probs: Tensor,
    actions: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    episode_lens: Tensor | None = None,
    eps_clip: float | tuple[float, float] = 0.2,
    switch_beta_frequency: int | None = None,
    return_kl_loss: bool = False,
    kl_loss_weight: float = 0.0,
    use_tpo: bool = False,
    tpo_eta: float = 1.0,
    tpo_group_size: int | None = None,
    per_entry: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The policy's loss on stored episodes, and if asked for the weighted KL; see our ``policy_losses``.

    mask (b, t) or (b, t, 1): switches, every step if None. switch_beta_frequency: switches at regular steps instead.
    """
    batch, steps = state.shape[:2]
    if switch_beta_frequency is not None:
        mask = regular_switches(batch, steps, switch_beta_frequency)
    advantages = advantages.flatten() if advantages.numel() == batch else advantages.view(batch, steps)
    mask = mask[..., 0] if mask is not None and mask.dim() == 3 else mask
    losses = policy_losses(
        meta_controller,
        *on_device_of(meta_controller, state, old_log_probs, actions, advantages, mask, episode_lens),
        eps_clip=eps_clip,
        objective="target" if use_tpo else "clipped",
        eta=tpo_eta,
        group=tpo_group_size,
        per_entry=per_entry,
    )
    return (losses.surrogate, losses.kl * kl_loss_weight) if return_kl_loss else losses.surrogate


def ratio_loss(
    meta_controller: OurMetaController,
    target_segment_len: float,
    switch_beta: Tensor,
    hard_switch_beta: Tensor | None = None,
    episode_lens: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The ratio loss of given switching probabilities (b, t); hard switches are those at 0.5 and above if not given."""
    steps = switch_beta.shape[1]
    lengths = switch_beta.new_full((len(switch_beta),), steps) if episode_lens is None else episode_lens
    beta, hard, lengths = on_device_of(meta_controller, switch_beta, hard_switch_beta, lengths)
    return ours.ratio_loss(beta, length_mask(lengths, steps), target_segment_len, chunk=chunk_size, hard=hard)


def extract_grpo_data(meta_controller: Any, transformer_output: Any) -> GRPOOutput:
    """What internal RL stores of the step that left ``transformer_output``."""
    output = transformer_output.prev_hiddens.meta_controller
    log_prob = meta_controller.log_prob(output.action_dist, output.actions)
    return GRPOOutput(output.input_residual_stream, output.actions, log_prob, output.switch_beta)


def tpo_target(log_scores: Tensor, u: Tensor, eta: float = 1.0) -> Tensor:
    """See `control.losses.policy_target`."""
    return ours.policy_target(log_scores, u, eta)


def z_score(t: Tensor, dim: int | None = None, eps: float = 1e-8) -> Tensor:
    """See `control.losses.z_score`."""
    return ours.z_score(t, dim, eps)
