"""A guided start of discovery (our choice): codes first are those that linear maps with fixed points name.

Discovery has to find two things at once, what to read from an episode and what to do with it, and each gives the other
a signal only where it is there already. Where episodes are long and decisions rare it may find neither. So for the
first updates each step is steered by the code that `objectives.fixed_points` names, without a label; the encoder
learns to propose that code, and the gate to switch where it changes:

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t)
         + -log q(z_t | e_1:T), mean over the steps where a code begins and over all  +  10 BCE(beta_t, code begins)

The gate is asked with the histories of random steps, so that it learns to see that a code is over, and not which codes
follow each other in demonstrations; the updates of eq. 3 after these leave it as it is, norm and history that it reads
included, which the encoder reads too: beta of given residuals and codes stays the same to the bit. With clips
(`objectives.clips`) the first term of their steps is added, each steered by the code of its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.control.core import DiscoveryOutput
from metacontroller.control.discovery_losses import episode_residual
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Augment, Generate
from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.protocol import SteerableModel
from metacontroller.objectives.clips import Clips, clip_extras, clips_of
from metacontroller.objectives.fixed_points import FixedPoints
from metacontroller.training.loop import BatchExtras
from metacontroller.training.seeding import noise_generator

EPISODES, VIEWS = 600, 4
"""Demonstrations to fit the maps to, and random symmetries of each, where the world has some."""
GATE_WEIGHT = 10.0
"""Of the gate's cross-entropy: one step in some fifty decides over it."""

Positions = Callable[[Tensor], Tensor]
"""States (n, t, *obs) -> (n, t, p): where things are as seen from the agent, see `Domain.positions`."""


def check_nameable(kind: str) -> None:
    """UserError unless codes of this kind can be named."""
    if kind != "binary":
        raise UserError(
            f"guided_updates needs codes that can be named, and meta_controller.code is {kind!r}; set it to 'binary', "
            "or guided_updates to 0."
        )


class Guide:
    """Names codes for a metacontroller of binary codes; UserError for another one."""

    def __init__(
        self,
        meta_controller: MetaController,
        generate: Generate,
        positions: Positions,
        *,
        augment: Augment | None,
        seed: int,
    ) -> None:
        check_nameable(meta_controller.codes.kind)
        self.meta_controller, self.generate, self.positions = meta_controller, generate, positions
        self.augment, self.seed = augment, seed

    @cached_property
    def fixed_points(self) -> FixedPoints:
        """Fitted when first asked for: some seconds."""
        generator = noise_generator(self.seed, torch.device("cpu"))
        episodes = self.generate(EPISODES, generator)
        views = [self.positions(episodes.states)]
        if self.augment is not None:
            views = [self.positions(self.augment(episodes.states, generator)) for _ in range(VIEWS)]
        codes = self.meta_controller.codes.dim
        return FixedPoints.fit(torch.stack(views), episodes.lengths, codes, generator)

    def named(self, episodes: Trajectories) -> Tensor:
        """(b, t) int64: the code of each step."""
        states, lengths = episodes.states, episodes.lengths
        states = states if states.shape[1] > episodes.steps else F.pad(states, (0, 0, 0, 1))
        return self.fixed_points.codes(self.positions(states).cpu(), lengths.cpu()).to(lengths.device)

    def extras(self, batch: Trajectories) -> BatchExtras:
        """Of a whole batch: ``named`` (b, t) int64, each step's code, and two (b,) that are the same for all rows, the
        shares of its real steps at which a code begins and which are not an episode's first."""
        named = self.named(batch)
        begins, later = _begins(named, batch.mask()), _later(batch.mask())
        shares = {"begin_share": begins, "later_share": later}
        return {"named": named} | {name: _share(of, batch).expand(batch.batch) for name, of in shares.items()}

    def teacher_codes(self, extras: BatchExtras) -> Tensor:
        """(b, t, n_z): the code of each step."""
        return self._code(extras["named"])

    def _code(self, named: Tensor) -> Tensor:
        """(...) int64 -> (..., n_z)."""
        return F.one_hot(named, self.meta_controller.codes.dim).to(self.meta_controller.policy.readout.weight)

    def clip_extras(self, drawn: Clips, batch: Trajectories) -> BatchExtras:
        """Clips as extras of a whole batch, with the code of each, ``clip_named``: that of its first step."""
        named = self.named(drawn.whole)[drawn.rows, drawn.starts]
        return {**clip_extras(drawn, batch), "clip_named": named.unflatten(0, (batch.batch, -1))}

    def clip_loss(self, model: SteerableModel, batch: Trajectories, extras: BatchExtras) -> Tensor:
        """Mean over the clips' steps of -log p(a_t | ..., z) under their codes, a scalar."""
        clips, factor = clips_of(extras, batch)
        residual = episode_residual(model, clips.states[:, : clips.steps], clips.actions)
        code = self._code(extras["clip_named"].flatten(0, 1))[:, None].expand(-1, clips.steps, -1)
        steered = self.meta_controller.steer(residual, code)
        losses = model.losses_under(steered, clips.states, clips.actions, clips.lengths, with_state_loss=False)
        return factor * losses.action

    def loss(self, batch: Trajectories, extras: BatchExtras, output: DiscoveryOutput) -> Tensor:
        """What encoder and gate lack to propose the codes that ``output`` holds, a scalar.

        `train` weights a process by its share of all real steps. The means here are over some of them; factors, 1 in a
        single process, make the sum over processes the mean over the whole batch.
        """
        mask, codes = output.mask, self.meta_controller.codes
        begins, later = _begins(extras["named"], mask), _later(mask)
        missing = -codes.log_prob(output.distribution, output.z).sum(-1)
        first = masked_mean(missing, begins) * (_share(begins, batch) / extras["begin_share"][0])
        loss = first + masked_mean(missing, mask)
        if self.meta_controller.gate_config.mode in ("forced", "fixed-frequency"):
            return loss  # such a gate has nothing to learn
        switch = F.binary_cross_entropy(output.beta, begins.to(output.beta), reduction="none")
        gate = masked_mean(switch, later) * (_share(later, batch) / extras["later_share"][0])
        return loss + GATE_WEIGHT * gate


def _begins(named: Tensor, mask: Tensor) -> Tensor:
    """(b, t) bool: real steps at which a code begins, the first of an episode too."""
    return F.pad(named[:, 1:] != named[:, :-1], (1, 0), value=True) & mask


def _later(mask: Tensor) -> Tensor:
    """(b, t) bool: real steps that are not the first of their episode."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) > 0)


def _share(steps: Tensor, batch: Trajectories) -> Tensor:
    """Share of a batch's real steps that ``steps`` (b, t) bool marks, a scalar above 0."""
    return (steps.sum() / batch.lengths.sum()).clamp_min(1e-9)
