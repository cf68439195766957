"""States of categories and numbers at once: their encoder, and the readout that predicts them.

A state is one vector of floats: the categories, then the numbers. Axes: b batch, t steps, n model width, k categories,
m numbers, p parameters: the logits of every category, then means and log standard deviations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.models.float_states import FloatStates, limited
from metacontroller.models.readouts import GaussianReadout, MultiCategoricalReadout, block_starts
from metacontroller.ranges import ROWS, check_each, check_number


class MixedReadout(nn.Module):
    """A softmax for each category and a Gaussian of the numbers, independent of each other."""

    def __init__(self, dim: int, sizes: Sequence[int], num_continuous: int) -> None:
        super().__init__()
        self.categories = MultiCategoricalReadout(dim, sizes)
        self.numbers = GaussianReadout(dim, num_continuous)
        self.logits = sum(sizes)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (b, t, n) -> parameters (b, t, p)."""
        return torch.cat([self.categories(hidden), self.numbers(hidden)], -1)

    def log_prob(self, params: Tensor, states: Tensor) -> Tensor:
        """Joint log-probability of each step's categories and numbers: (b, t, p), (b, t, k + m) -> (b, t)."""
        entries = len(self.categories.num_discrete)
        chosen = self.categories.log_prob(params[..., : self.logits], states[..., :entries].long())
        return chosen + self.numbers.log_prob(params[..., self.logits :], states[..., entries:])

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy of the categories and differential entropy of the numbers, in nats: (b, t, p) -> (b, t)."""
        return self.categories.entropy(params[..., : self.logits]) + self.numbers.entropy(params[..., self.logits :])

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One state per step, (b, t, k + m)."""
        chosen = self.categories.sample(params[..., : self.logits], generator)
        return torch.cat([chosen.to(params.dtype), self.numbers.sample(params[..., self.logits :], generator)], -1)


class MixedEncoder(FloatStates, nn.Module):
    """A learned embedding of each category and a linear map of the numbers; their sum.

    sizes: values of each of the k categories. num_continuous: m. UserError for values out of range.
    """

    offsets: Tensor

    def __init__(self, dim: int, *, sizes: Sequence[int], num_continuous: int) -> None:
        super().__init__()
        self.sizes, self.num_continuous = list(sizes), num_continuous
        check_number("num_continuous", num_continuous, ROWS)
        check_each("num_discrete", self.sizes, ROWS)
        self.register_buffer("offsets", block_starts(self.sizes), persistent=False)
        self.table = nn.Embedding(sum(self.sizes), dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        self.linear = nn.Linear(num_continuous, dim)

    def forward(self, states: Tensor) -> Tensor:
        """states (b, t, k + m) float -> (b, t, n)."""
        self._check_shape(states)
        entries = len(self.sizes)
        chosen = self.table(states[..., :entries].long() + self.offsets).sum(-2)
        return chosen + self.linear(limited(states[..., entries:].to(self.linear.weight.dtype)))

    def state_readout(self, dim: int) -> MixedReadout:
        """The readout that predicts the next state from a residual of width ``dim``."""
        return MixedReadout(dim, self.sizes, self.num_continuous)

    def check(self, states: Tensor) -> None:
        """UserError unless the states are finite and their categories known; synchronizes with the device."""
        super().check(states)
        chosen = states[..., : len(self.sizes)]
        wrong = (chosen < 0) | (chosen >= chosen.new_tensor(self.sizes)) | (chosen != chosen.round())
        if bool(wrong.any()):
            entry = int(wrong.flatten(0, -2).any(0).nonzero()[0])
            raise UserError(f"entry {entry} of a state is no category; expected 0..{self.sizes[entry] - 1}.")

    def _check_shape(self, states: Tensor) -> None:
        entries = len(self.sizes) + self.num_continuous
        if states.shape[-1] != entries or not states.is_floating_point():
            raise UserError(
                f"state has shape {tuple(states.shape)} and dtype {states.dtype}; expected floating-point (..., "
                f"{entries}): {len(self.sizes)} categories, then {self.num_continuous} numbers."
            )
