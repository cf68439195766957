"""A guided start of discovery (our choice): codes first are those that linear maps with fixed points name.

Discovery has to find two things at once, what to read from an episode and what to do with it, and each gives the other
a signal only where it is there already. Where episodes are long and decisions rare it may find neither. So for the
first updates each step is steered by the code that `control.fixed_points` names, without a label; the encoder learns to
propose that code, and the gate to switch where it changes:

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t)
         + -log q(z_t | e_1:T), mean over the steps where a code begins and over all  +  10 BCE(beta_t, code begins)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.control.discovery import DiscoveryOutput
from metacontroller.control.fixed_points import FixedPoints
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Augment, Generate
from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.errors import UserError
from metacontroller.training.loop import BatchExtras
from metacontroller.training.seeding import noise_generator

EPISODES, VIEWS = 600, 4
"""Demonstrations to fit the maps to, and random symmetries of each, where the world has some."""
GATE_WEIGHT = 10.0
"""Of the gate's cross-entropy: one step in some fifty decides over it."""

Positions = Callable[[Tensor], Tensor]
"""States (n, t, *obs) -> (n, t, p): where things are as seen from the agent, see `Domain.positions`."""


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
        if meta_controller.codes.kind != "binary":
            raise UserError(
                f"guided_updates needs codes that can be named, and meta_controller.code is "
                f"{meta_controller.codes.kind!r}; set it to 'binary', or guided_updates to 0."
            )
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

    def extras(self, batch: Trajectories) -> BatchExtras:
        """Of a whole batch: ``named`` (b, t) int64, each step's code, and two (b,) that are the same for all rows, the
        shares of its real steps at which a code begins and which are not an episode's first."""
        states = batch.states if batch.states.shape[1] > batch.steps else F.pad(batch.states, (0, 0, 0, 1))
        named = self.fixed_points.codes(self.positions(states).cpu(), batch.lengths.cpu()).to(batch.lengths.device)
        begins, later = _begins(named, batch.mask()), _later(batch.mask())
        shares = {"begin_share": begins, "later_share": later}
        return {"named": named} | {name: _share(of, batch).expand(batch.batch) for name, of in shares.items()}

    def held(self, extras: BatchExtras) -> Tensor:
        """(b, t, n_z): the code of each step."""
        codes = self.meta_controller.codes.dim
        return F.one_hot(extras["named"], codes).to(self.meta_controller.policy.readout.weight)

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
