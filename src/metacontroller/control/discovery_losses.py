"""Discovery over whole episodes of a frozen model: what steers, and the terms of eq. 3.

Axes: b batch, t steps, n_e residual, n_z code. States hold T or T + 1 entries for T actions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metacontroller.control.core import DiscoveryNoise, DiscoveryOutput, discover
from metacontroller.control.losses import ratio_loss
from metacontroller.control.modules import SteeringModules
from metacontroller.data.trajectories import Ratio, masked_mean, masked_sums
from metacontroller.models.chunked_losses import row_chunks
from metacontroller.models.protocol import BehaviorCloningLosses, DiscoveryLosses, SteerableModel


def episode_residual(model: SteerableModel, states: Tensor, actions: Tensor, train_model: bool = False) -> Tensor:
    """The residual e_t at the controlled layer for every state, (b, T or T + 1, n_e), as many as states.

    Without train_model it carries no gradient, and the rows are computed in chunks.
    """
    past = actions[:, : states.shape[1] - 1]
    if train_model:
        return model.lower(model.embed(states, past))
    with torch.no_grad():
        return torch.cat([model.lower(model.embed(states[rows], past[rows])) for rows in row_chunks(states)])


def discover_episodes(
    modules: SteeringModules,
    model: SteerableModel,
    states: Tensor,
    actions: Tensor,
    episode_lens: Tensor | None = None,
    *,
    noise: DiscoveryNoise | None = None,
    embedded_states: Tensor | None = None,
    train_model: bool = False,
    teacher_codes: Tensor | None = None,
) -> DiscoveryOutput:
    """`discover` on the residuals of whole episodes: states (b, T or T + 1, ...), actions (b, T, ...).

    With T + 1 states the sequence embedder also reads the last one, the only one that shows the result of the last
    action. embedded_states: states that it reads instead, such as augmented ones. train_model: whether gradients reach
    the model's own weights, as in co-training (Fig. 7, 8). noise, teacher_codes: as of `discover`.
    """
    steps = actions.shape[1]
    embedded = episode_residual(model, states if embedded_states is None else embedded_states, actions, train_model)
    residual = embedded[:, :steps]
    if embedded_states is not None:
        residual = episode_residual(model, states[:, :steps], actions, train_model)
    options = {"embedded_residual": embedded, "teacher_codes": teacher_codes}
    return discover(modules, residual, episode_lens, noise, **options)


def steered_losses(
    modules: SteeringModules,
    model: SteerableModel,
    states: Tensor,
    actions: Tensor,
    episode_lens: Tensor | None = None,
    *,
    with_state_loss: bool = True,
    train_model: bool = False,
    **options: Any,
) -> tuple[BehaviorCloningLosses, DiscoveryOutput]:
    """State and action loss under steering, and the result of `discover_episodes`, which explains the arguments.

    options: noise, embedded_states and teacher_codes of it.
    """
    batch = states, actions, episode_lens
    output = discover_episodes(modules, model, *batch, train_model=train_model, **options)
    if train_model:
        return model.readout_losses(model.upper(output.steered), *batch, with_state_loss), output
    return model.losses_under(output.steered, *batch, with_state_loss=with_state_loss), output


def discovery_loss(
    modules: SteeringModules,
    model: SteerableModel,
    states: Tensor,
    actions: Tensor,
    episode_lens: Tensor | None = None,
    *,
    with_state_loss: bool = True,
) -> DiscoveryLosses:
    """The losses of eq. 3; UserError for a batch that does not fit the model."""
    model.check_batch(states, actions, episode_lens)
    losses, output = steered_losses(modules, model, states, actions, episode_lens, with_state_loss=with_state_loss)
    return DiscoveryLosses(*losses, kl_loss(output), auxiliary_ratio_loss(modules, output))


def kl_loss(output: DiscoveryOutput) -> Tensor:
    """Mean KL per real step (eq. 3), without the weight alpha."""
    return masked_mean(output.kl, output.mask)


def auxiliary_ratio_loss(modules: SteeringModules, output: DiscoveryOutput, share: Tensor | None = None) -> Tensor:
    """The optional H-Net loss times its weight, a scalar; 0 when the weight is 0. share: see `ratio_loss`."""
    if modules.ratio_loss_weight == 0:
        return output.beta.new_zeros(())
    target, threshold = modules.target_segment_length, modules.gate_config.threshold
    return modules.ratio_loss_weight * ratio_loss(output.beta, output.mask, target, threshold, share=share)


def hard_switches(modules: SteeringModules, output: DiscoveryOutput) -> Ratio:
    """How many of the real steps have beta at the threshold or above: the F of `ratio_loss`."""
    return masked_sums((output.beta >= modules.gate_config.threshold).to(output.beta.dtype), output.mask)
