"""A guided start of discovery (our choice): codes first are those that linear maps with fixed points name.

Discovery has to find two things at once, what to read from an episode and what to do with it, and each gives the other
a signal only where it is there already. Where episodes are long and decisions rare it may find neither. So for the
first updates each step is steered by the code that `objectives.fixed_points` names, without a label; the encoder
learns to propose that code, and the gate to switch where it changes:

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t)
         + -log q(z_t | e_1:T), mean over the steps where a code begins and over all  +  10 BCE(beta_t, code begins)

The gate is asked with the histories of random steps, so that it learns to see that a code is over, and not which codes
follow each other in demonstrations; the objective that follows leaves it as it is, norm and history that it reads
included, which the encoder reads too: beta of given residuals and codes stays the same to the bit. With clips
(`objectives.clips`) the first term of their steps is added, each steered by the code of its first step.

Metrics: those of `objectives.steering`; the gate is that after the codes of fixed points.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.control.core import DiscoveryOutput
from metacontroller.control.discovery_losses import episode_residual
from metacontroller.control.parameter_groups import fixed_gate
from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.errors import UserError
from metacontroller.metrics.switch_alignment import later_steps
from metacontroller.objectives.base import Objective, Setup, mean_over, share_of
from metacontroller.objectives.clips import Clips, clip_extras, clips_of, draw_clips
from metacontroller.objectives.config import DiscoverConfig
from metacontroller.objectives.fixed_points import FixedPoints
from metacontroller.objectives.steering import metrics, noise_and_views, steer
from metacontroller.training.loop import BatchExtras, Metrics
from metacontroller.training.seeding import noise_generator

EPISODES, VIEWS = 600, 4
"""Demonstrations to fit the maps to, and random symmetries of each, where the world has some."""
GATE_WEIGHT = 10.0
"""Of the gate's cross-entropy: one step in some fifty decides over it."""


def check_nameable(kind: str) -> None:
    """UserError unless codes of this kind can be named."""
    if kind != "binary":
        raise UserError(
            f"guided_updates needs codes that can be named, and meta_controller.code is {kind!r}; set it to 'binary', "
            "or guided_updates to 0."
        )


class Guided:
    """The first ``guided_updates`` of an objective that ``following`` goes on with (`Objective`).

    UserError without positions, and for codes that cannot be named.
    """

    def __init__(self, following: Objective, config: DiscoverConfig, setup: Setup) -> None:
        if setup.positions is None:
            raise UserError(f"guided_updates is {config.guided_updates}, but no positions are given; expected 0.")
        check_nameable(setup.meta_controller.codes.kind)
        self.following, self.config, self.setup, self.positions = following, config, setup, setup.positions
        self.module, self.parameters = following.module, following.parameters

    def prepare(self, batch: Trajectories, step: int, generator: torch.Generator) -> BatchExtras:
        if step >= self.config.guided_updates:
            return self.following.prepare(batch, step, generator)
        extras, codes = noise_and_views(self.setup, batch, generator), self.codes_of(batch)
        begins, later = _begins(codes, batch.mask()), later_steps(batch.lengths, batch.steps)
        for name, steps in (("begin_share", begins), ("later_share", later)):
            extras[name] = share_of(steps, batch).expand(batch.batch)
        extras["fixed_point_codes"] = codes
        if self.config.clips and self.setup.decisions is not None:
            count = self.config.clips * batch.batch
            drawn = draw_clips(self.setup.generate, self.setup.decisions, count, self.config.clip_steps, generator)
            extras |= self.clip_extras(drawn, batch)
        return extras

    def loss(self, batch: Trajectories, step: int, extras: BatchExtras) -> tuple[Tensor, Metrics]:
        if step >= self.config.guided_updates:
            with fixed_gate(self.setup.meta_controller):  # it would open where nothing begins (log 112, 113)
                return self.following.loss(batch, step, extras)
        steered = steer(self.config, self.setup, batch, extras, self.code_vectors(extras["fixed_point_codes"]))
        loss = steered.loss + self.proposal_loss(batch, extras, steered.output)
        if self.config.clips:
            loss = loss + self.clip_loss(batch, extras)
        return loss, metrics(self.setup, batch, steered, self.config.alpha_at(step))

    def proposal_loss(self, batch: Trajectories, extras: BatchExtras, output: DiscoveryOutput) -> Tensor:
        """What encoder and gate lack to propose the codes that ``output`` holds, a scalar."""
        mask, meta_controller = output.mask, self.setup.meta_controller
        begins, later = _begins(extras["fixed_point_codes"], mask), later_steps(batch.lengths, batch.steps)
        missing = -meta_controller.codes.log_prob(output.distribution, output.z).sum(-1)
        loss = mean_over(missing, begins, batch, extras["begin_share"]) + masked_mean(missing, mask)
        if meta_controller.gate_config.mode in ("forced", "fixed-frequency"):
            return loss  # such a gate has nothing to learn
        switch = F.binary_cross_entropy(output.beta, begins.to(output.beta), reduction="none")
        return loss + GATE_WEIGHT * mean_over(switch, later, batch, extras["later_share"])

    def clip_extras(self, drawn: Clips, batch: Trajectories) -> BatchExtras:
        """Clips as extras of a whole batch, with the code of each, ``clip_codes``: that of its first step."""
        codes = self.codes_of(drawn.episodes)[drawn.rows, drawn.starts]
        return {**clip_extras(drawn, batch), "clip_codes": codes.unflatten(0, (batch.batch, -1))}

    def clip_loss(self, batch: Trajectories, extras: BatchExtras) -> Tensor:
        """Mean over the clips' steps of -log p(a_t | ..., z) under their codes, a scalar."""
        model, (clips, factor) = self.setup.model, clips_of(extras, batch)
        residual = episode_residual(model, clips.states[:, : clips.steps], clips.actions)
        codes = self.code_vectors(extras["clip_codes"].flatten(0, 1))[:, None].expand(-1, clips.steps, -1)
        steered = self.setup.meta_controller.steer(residual, codes)
        losses = model.losses_under(steered, clips.states, clips.actions, clips.lengths, with_state_loss=False)
        return factor * losses.action

    @cached_property
    def fixed_points(self) -> FixedPoints:
        """Fitted when first asked for: some seconds."""
        generator = noise_generator(self.config.seed, torch.device("cpu"))
        episodes, augment = self.setup.generate(EPISODES, generator), self.setup.augment
        views = [self.positions(episodes.states)]
        if augment is not None:
            views = [self.positions(augment(episodes.states, generator)) for _ in range(VIEWS)]
        codes = self.setup.meta_controller.codes.dim
        return FixedPoints.fit(torch.stack(views), episodes.lengths, codes, generator)

    def codes_of(self, episodes: Trajectories) -> Tensor:
        """(b, t) int64: the code of each step."""
        states, lengths = episodes.states, episodes.lengths
        states = states if states.shape[1] > episodes.steps else F.pad(states, (0, 0, 0, 1))
        return self.fixed_points.codes(self.positions(states).cpu(), lengths.cpu()).to(lengths.device)

    def code_vectors(self, codes: Tensor) -> Tensor:
        """Codes (...) int64 -> (..., n_z)."""
        meta_controller = self.setup.meta_controller
        return F.one_hot(codes, meta_controller.codes.dim).to(meta_controller.policy.readout.weight)


def _begins(codes: Tensor, mask: Tensor) -> Tensor:
    """(b, t) bool: real steps at which a code begins, the first of an episode too."""
    return F.pad(codes[:, 1:] != codes[:, :-1], (1, 0), value=True) & mask
