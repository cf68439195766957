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

    def codes(self, batch: Trajectories) -> Tensor:
        """(b, t, n_z): the code of each step."""
        states = batch.states if batch.states.shape[1] > batch.steps else F.pad(batch.states, (0, 0, 0, 1))
        named = self.fixed_points.codes(self.positions(states).cpu(), batch.lengths.cpu())
        return F.one_hot(named, self.meta_controller.codes.dim).to(batch.states)

    def loss(self, output: DiscoveryOutput) -> Tensor:
        """What encoder and gate lack to propose the codes that ``output`` holds, a scalar."""
        held = output.z.argmax(-1)
        begins = F.pad(held[:, 1:] != held[:, :-1], (1, 0), value=True) & output.mask
        codes = self.meta_controller.codes
        missing = -codes.log_prob(output.distribution, output.z).sum(-1)
        later = output.mask & (torch.arange(held.shape[1], device=held.device) > 0)
        switch = F.binary_cross_entropy(output.beta, begins.to(output.beta), reduction="none")
        return (
            masked_mean(missing, begins) + masked_mean(missing, output.mask) + GATE_WEIGHT * masked_mean(switch, later)
        )
