"""Discovery over whole episodes of a frozen model (eq. 3): what the metacontroller does, and what it costs.

Axes: b batch, t steps, n_e residual, n_z code. States hold T or T + 1 entries for T actions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metacontroller.control.losses import ratio_loss
from metacontroller.control.switching import GateConfig
from metacontroller.data.trajectories import masked_mean
from metacontroller.models.chunked_losses import row_chunks
from metacontroller.models.protocol import BehaviorCloningLosses, DiscoveryLosses, SteerableModel


class DiscoveryNoise(NamedTuple):
    """The random numbers of discovery: code (b, t, n_z) standard normal; gate (b, t) uniform in (0, 1), which only the
    Gumbel-sigmoid gate uses."""

    code: Tensor
    gate: Tensor


class DiscoveryOutput(NamedTuple):
    """What discovery computes over a batch of episodes.

    steered (b, t, n_e): e + U e. z, gate, beta: the integrated code (b, t, n_z), the gate as mixed and its probability
    (b, t). kl (b, t): of the proposal against N(0, I), at every step. mask (b, t) bool of real steps.
    mean, log_std (b, t, n_z): the proposal's distribution.
    """

    steered: Tensor
    z: Tensor
    gate: Tensor
    beta: Tensor
    kl: Tensor
    mask: Tensor
    mean: Tensor
    log_std: Tensor


class EpisodeDiscovery:
    """What a metacontroller does with a model's episodes; mixed into `MetaController`, which defines ``discover``."""

    ratio_loss_weight: float
    target_segment_length: float
    gate_config: GateConfig

    def discover(
        self,
        residual: Tensor,
        episode_lens: Tensor | None = None,
        noise: DiscoveryNoise | None = None,
        *,
        embedded_residual: Tensor | None = None,
    ) -> DiscoveryOutput:
        """Proposes, integrates and steers along residuals (b, t, n_e)."""
        raise NotImplementedError

    def discover_episodes(
        self,
        model: SteerableModel,
        states: Tensor,
        actions: Tensor,
        episode_lens: Tensor | None = None,
        *,
        noise: DiscoveryNoise | None = None,
        embedded_states: Tensor | None = None,
        train_model: bool = False,
    ) -> DiscoveryOutput:
        """`discover` along whole episodes of a model: states (b, T or T + 1, ...), actions (b, T, ...).

        With T + 1 states the sequence embedder reads the last one too: what the last action led to shows only there.
        embedded_states: the episodes as it shall see them, if not as they are. noise: drawn anew if not given.
        train_model: whether gradients reach the model's own weights, as in co-training (Fig. 7, 8); the method freezes
        them.
        """
        steps = actions.shape[1]
        viewed = states if embedded_states is None else embedded_states
        embedded = whole_residual(model, viewed, actions, train_model)
        seen = embedded[:, :steps]
        if embedded_states is not None:
            seen = whole_residual(model, states[:, :steps], actions, train_model)
        return self.discover(seen, episode_lens, noise, embedded_residual=embedded)

    def steered_losses(
        self,
        model: SteerableModel,
        states: Tensor,
        actions: Tensor,
        episode_lens: Tensor | None = None,
        *,
        with_state_loss: bool = True,
        noise: DiscoveryNoise | None = None,
        embedded_states: Tensor | None = None,
        train_model: bool = False,
    ) -> tuple[BehaviorCloningLosses, DiscoveryOutput]:
        """State and action loss under steering, and what the metacontroller did; arguments: see `discover_episodes`."""
        output = self.discover_episodes(
            model,
            states,
            actions,
            episode_lens,
            noise=noise,
            embedded_states=embedded_states,
            train_model=train_model,
        )
        steered, options = output.steered, {"with_state_loss": with_state_loss}
        if train_model:
            hidden = model.upper(steered)
            return model.readout_losses(hidden, states, actions, episode_lens, **options), output
        return model.losses_under(steered, states, actions, episode_lens, **options), output

    def discovery_loss(
        self,
        model: SteerableModel,
        states: Tensor,
        actions: Tensor,
        episode_lens: Tensor | None = None,
        *,
        with_state_loss: bool = True,
    ) -> DiscoveryLosses:
        """Losses of eq. 3 under steering; the arguments are checked."""
        model.check_batch(states, actions, episode_lens)
        losses, output = self.steered_losses(model, states, actions, episode_lens, with_state_loss=with_state_loss)
        return DiscoveryLosses(*losses, self.kl_loss(output), self.auxiliary_ratio_loss(output))

    def kl_loss(self, output: DiscoveryOutput) -> Tensor:
        """Mean KL per real step (eq. 3); the weight alpha is the caller's."""
        return masked_mean(output.kl, output.mask)

    def auxiliary_ratio_loss(self, output: DiscoveryOutput) -> Tensor:
        """The optional H-Net loss times its weight; zero when the weight is zero."""
        if self.ratio_loss_weight == 0:
            return output.beta.new_zeros(())
        loss = ratio_loss(output.beta, output.mask, self.target_segment_length, self.gate_config.threshold)
        return self.ratio_loss_weight * loss


def whole_residual(model: SteerableModel, states: Tensor, actions: Tensor, train_model: bool = False) -> Tensor:
    """e_t of every state given, (b, T or T + 1, n_e): of the one after the last action too, if it is there."""
    past = actions[:, : states.shape[1] - 1]
    if train_model:
        return model.lower(model.embed(states, past))
    with torch.no_grad():
        return torch.cat([model.lower(model.embed(states[rows], past[rows])) for rows in row_chunks(states)])
