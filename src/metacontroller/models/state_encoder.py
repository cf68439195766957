"""The interface of state encoders: what of an observation is read, checked and predicted.

Axes: b batch, t steps, n model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.models.readouts import Readout, make_readout
from metacontroller.models.values import check_values
from metacontroller.tensors import check_tensor

OBSERVATION_LIMIT = 1e9
"""Of the numbers of an observation: the squares of larger ones would overflow in the layers behind."""


class StateEncoder(nn.Module):
    """Maps observations to the first residual, and defines the target of the state loss.

    A subclass defines ``forward`` and sets shape: of one state; dtype: of states, of floats any precision is read;
    sizes: numbers of categories of the first entries of a state's last axis; contents: what a state is, for errors;
    predicted: options of the readout that predicts ``targets``, see `make_readout`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    sizes: tuple[int, ...] = ()
    contents: str = ""
    predicted: dict[str, Any]

    def forward(self, states: Tensor) -> Tensor:
        """states (b, t, *shape) -> (b, t, n). UserError for another shape or dtype."""
        raise NotImplementedError

    def state_readout(self, dim: int) -> Readout:
        """The readout that predicts ``targets`` of the next observation from a residual of width ``dim``."""
        return make_readout(dim, "predicted", self.predicted)

    def targets(self, states: Tensor) -> Tensor:
        """What the state loss predicts of states (b, t, *shape): here, all of it."""
        return states

    def from_observation(self, observation: Any) -> Tensor:
        """Converts one observation of an environment to one state, without batch and time axes."""
        return torch.as_tensor(observation, dtype=self.dtype)

    def check_shape(self, states: Tensor) -> None:
        """UserError unless states are (b, t, *shape) of this dtype."""
        dtype = float if self.dtype.is_floating_point else self.dtype
        check_tensor("state", states, (*states.shape[:2], *self.shape), dtype, self.contents)

    def check(self, states: Tensor) -> None:
        """UserError for states that cannot be read, NaN and unknown categories among them; waits for the device."""
        shape = (*states.shape[:2], *self.shape)
        check_values("state", states, shape, self.dtype, self.sizes, self.contents)


def limited(numbers: Tensor) -> Tensor:
    """Numbers of an observation within ±1e9, or within what their type holds."""
    limit = min(OBSERVATION_LIMIT, torch.finfo(numbers.dtype).max)
    return numbers.clamp(-limit, limit)
