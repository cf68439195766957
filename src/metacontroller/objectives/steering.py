"""Eq. 3, the paper's objective: a metacontroller learns to steer a frozen model with codes, at a cost of alpha KL.

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t) - lambda log p(o_{t+1} | o_1:t, z_1:t)
         + alpha KL(q(z_t | e_1:T) || N(0, I))

Not in the paper: alpha may rise linearly, and with ``ratio_loss_weight`` H-Net's loss of the gate is added
(`control.losses`).

Metrics, means over the log interval: ``loss``, ``action_loss`` (steered) and ``kl`` in nats per step, ``alpha``,
``switches`` (sum of the soft gate over an episode, without the first step), ``codes`` (per episode, where the gate is
thresholded, as when acting), and the alignment of the gate with the subgoals' labels, which discovery never sees, on
the training batches: ``gate_recall``, ``gate_precision``, ``gate_binary_fraction``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metacontroller.control.core import DiscoveryNoise, DiscoveryOutput, sample_noise
from metacontroller.control.discovery_losses import auxiliary_ratio_loss, hard_switches, kl_loss, steered_losses
from metacontroller.control.parameter_groups import without
from metacontroller.data.trajectories import Ratio, Trajectories
from metacontroller.metrics.switch_alignment import codes_taken, gate_sums, later_steps
from metacontroller.objectives.base import Setup
from metacontroller.objectives.config import DiscoverConfig
from metacontroller.training.distributed import processes
from metacontroller.training.loop import BatchExtras, Metrics


class Steering:
    """Eq. 3 (`Objective`)."""

    def __init__(self, config: DiscoverConfig, setup: Setup) -> None:
        self.config, self.setup = config, setup
        self.module: nn.Module = setup.meta_controller
        self.parameters = without(self.module, setup.meta_controller.policy)
        self.workers = processes(next(setup.model.parameters()).device.type)

    def prepare(self, batch: Trajectories, step: int, generator: torch.Generator) -> BatchExtras:
        return noise_and_views(self.setup, batch, generator)

    def loss(self, batch: Trajectories, step: int, extras: BatchExtras) -> tuple[Tensor, Metrics]:
        meta_controller, alpha = self.setup.meta_controller, self.config.alpha_at(step)
        steered = steer(self.config, self.setup, batch, extras)
        loss = steered.loss + alpha * kl_loss(steered.output)
        if meta_controller.ratio_loss_weight > 0:
            switched = self.workers.mean(hard_switches(meta_controller, steered.output))
            loss = loss + auxiliary_ratio_loss(meta_controller, steered.output, switched)
        return loss, metrics(self.setup, batch, steered, alpha)


class Steered(NamedTuple):
    """loss: of actions and, with lambda, observations, a scalar. action: of actions alone. output: what steered."""

    loss: Tensor
    action: Tensor
    output: DiscoveryOutput


def noise_and_views(setup: Setup, batch: Trajectories, generator: torch.Generator) -> BatchExtras:
    """Noise in codes and gate, and the states that the sequence embedder reads in place of the batch's, if others."""
    noise = sample_noise(setup.meta_controller, batch.batch, batch.steps, generator)._asdict()
    return noise if setup.augment is None else {**noise, "embedded_states": setup.augment(batch.states, generator)}


def steer(
    config: DiscoverConfig, setup: Setup, batch: Trajectories, extras: BatchExtras, teacher_codes: Tensor | None = None
) -> Steered:
    """A batch under steering, by codes that the encoder proposes or by given ones (b, t, n_z)."""
    losses, output = steered_losses(
        setup.meta_controller,
        setup.model,
        batch.states,
        batch.actions,
        batch.lengths,
        with_state_loss=config.state_loss_weight > 0,
        train_model=config.train_model,
        noise=DiscoveryNoise(extras["code"], extras["gate"]),
        embedded_states=extras.get("embedded_states"),
        teacher_codes=teacher_codes,
    )
    return Steered(losses.action + config.state_loss_weight * losses.state, losses.action, output)


@torch.no_grad()
def metrics(setup: Setup, batch: Trajectories, steered: Steered, alpha: float) -> Metrics:
    """What is logged of a batch, besides its loss."""
    output, lengths, threshold = steered.output, batch.lengths, setup.meta_controller.gate_config.threshold
    kl, episodes = kl_loss(output), lengths.new_tensor(batch.batch)
    soft = output.gate.masked_fill(~later_steps(lengths, batch.steps), 0)
    codes = codes_taken(output.beta, lengths, threshold=threshold)
    measured: dict[str, Tensor | Ratio] = {"action_loss": steered.action, "kl": kl, "alpha": kl.new_full((), alpha)}
    measured |= {"switches": Ratio(soft.sum(), episodes), "codes": Ratio(codes.sum(), episodes)}
    if batch.segments is not None:
        options = {"threshold": threshold, "tolerance": setup.gate_tolerance}
        measured |= gate_sums(output.beta, batch.segments, lengths, **options)
    return measured
