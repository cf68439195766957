"""Discovery over whole episodes of a frozen model: steering and its losses (eq. 3).

Axes: b batch, t steps, n_e residual, n_z code. States hold T or T + 1 entries for T actions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metacontroller.control.losses import ratio_loss
from metacontroller.control.switching import GateConfig
from metacontroller.data.trajectories import Ratio, masked_mean, masked_sums
from metacontroller.models.chunked_losses import row_chunks
from metacontroller.models.protocol import BehaviorCloningLosses, DiscoveryLosses, SteerableModel


class DiscoveryNoise(NamedTuple):
    """code (b, t, n_z), of binary codes (b, t, bits): standard normal.

    gate (b, t): uniform in (0, 1), used by the Gumbel-sigmoid gate and, under given codes, to draw histories for it.
    """

    code: Tensor
    gate: Tensor


class DiscoveryOutput(NamedTuple):
    """Result of `MetaController.discover` for a batch of episodes.

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


class EpisodeDiscovery:
    """Mixin of `MetaController`: discovery on episodes of a model. The subclass defines ``discover``."""

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
        held: Tensor | None = None,
        fixed_gate: bool = False,
    ) -> DiscoveryOutput:
        """Proposes, integrates and steers along residuals (b, t, n_e); held: given codes (b, t, n_z) steer instead;
        fixed_gate: the gate gets no gradient."""
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
        held: Tensor | None = None,
        fixed_gate: bool = False,
    ) -> DiscoveryOutput:
        """`discover` on the residuals of whole episodes: states (b, T or T + 1, ...), actions (b, T, ...).

        With T + 1 states the sequence embedder also reads the last one, the only one that shows the result of the last
        action. embedded_states: states that the sequence embedder reads instead, such as augmented ones. noise: sampled
        if not given. train_model: whether gradients reach the model's own weights, as in co-training (Fig. 7, 8).
        held (b, T, n_z): codes that steer instead of the proposals. fixed_gate: the gate gets no gradient.
        """
        steps = actions.shape[1]
        embedded = whole_residual(model, states if embedded_states is None else embedded_states, actions, train_model)
        residual = embedded[:, :steps]
        if embedded_states is not None:
            residual = whole_residual(model, states[:, :steps], actions, train_model)
        return self.discover(
            residual, episode_lens, noise, embedded_residual=embedded, held=held, fixed_gate=fixed_gate
        )

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
        held: Tensor | None = None,
        fixed_gate: bool = False,
    ) -> tuple[BehaviorCloningLosses, DiscoveryOutput]:
        """State and action loss under steering, and the result of `discover_episodes`, which explains the arguments."""
        output = self.discover_episodes(
            model,
            states,
            actions,
            episode_lens,
            noise=noise,
            embedded_states=embedded_states,
            train_model=train_model,
            held=held,
            fixed_gate=fixed_gate,
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
        """The losses of eq. 3; UserError for a batch that does not fit the model."""
        model.check_batch(states, actions, episode_lens)
        losses, output = self.steered_losses(model, states, actions, episode_lens, with_state_loss=with_state_loss)
        return DiscoveryLosses(*losses, self.kl_loss(output), self.auxiliary_ratio_loss(output))

    def kl_loss(self, output: DiscoveryOutput) -> Tensor:
        """Mean KL per real step (eq. 3), without the weight alpha."""
        return masked_mean(output.kl, output.mask)

    def auxiliary_ratio_loss(self, output: DiscoveryOutput, share: Tensor | None = None) -> Tensor:
        """The optional H-Net loss times its weight, a scalar; 0 when the weight is 0. share: see `ratio_loss`."""
        if self.ratio_loss_weight == 0:
            return output.beta.new_zeros(())
        threshold = self.gate_config.threshold
        loss = ratio_loss(output.beta, output.mask, self.target_segment_length, threshold, share=share)
        return self.ratio_loss_weight * loss

    def hard_switches(self, output: DiscoveryOutput) -> Ratio:
        """How many of the real steps have beta at the threshold or above: the F of `ratio_loss`."""
        return masked_sums((output.beta >= self.gate_config.threshold).to(output.beta.dtype), output.mask)


def whole_residual(model: SteerableModel, states: Tensor, actions: Tensor, train_model: bool = False) -> Tensor:
    """The residual e_t at the controlled layer for every state, (b, T or T + 1, n_e), as many as states.

    Without train_model it carries no gradient, and the rows are computed in chunks.
    """
    past = actions[:, : states.shape[1] - 1]
    if train_model:
        return model.lower(model.embed(states, past))
    with torch.no_grad():
        return torch.cat([model.lower(model.embed(states[rows], past[rows])) for rows in row_chunks(states)])
