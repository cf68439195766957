"""What encoders of states that are vectors of floats have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metacontroller.errors import UserError

OBSERVATION_LIMIT = 1e9
"""Of the numbers of an observation: the squares of larger ones would overflow in the layers behind."""


def limited(numbers: Tensor) -> Tensor:
    """Numbers of an observation within ±1e9, or within what their type holds."""
    limit = min(OBSERVATION_LIMIT, torch.finfo(numbers.dtype).max)
    return numbers.clamp(-limit, limit)


class FloatStates:
    """Mixin of such an encoder. It has `_check_shape`: UserError for states of another width or dtype."""

    def targets(self, states: Tensor) -> Tensor:
        """The targets of ``state_readout`` in states (b, t, ...): the states themselves, within ±1e9."""
        return limited(states)

    def from_observation(self, observation: Any) -> Tensor:
        """Converts one observation of an environment to one state, without batch and time axes."""
        return torch.as_tensor(observation, dtype=torch.float32)

    def check(self, states: Tensor) -> None:
        """UserError unless the states are finite floats of the right width; synchronizes with the device."""
        self._check_shape(states)
        if not bool(torch.isfinite(states).all()):
            raise UserError("state holds NaN or infinite values; clean the data before training.")

    def _check_shape(self, states: Tensor) -> None:
        raise NotImplementedError
