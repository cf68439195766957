"""Losses divided by their running root mean square, which then need no weights (Dreamer 4, arXiv 2509.24527, §3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError


class LossScale(nn.Module):
    """Divides a loss by sqrt(m), m the exponential mean of its squares, which starts at 1.

    A loss is divided by the scale that holds before it is counted. decay: of the mean. UserError unless 0 < decay < 1.
    """

    mean_square: Tensor

    def __init__(self, decay: float = 0.999, smallest: float = 1e-6) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise UserError(f"the decay of a loss's scale is {decay}; expected a number between 0 and 1.")
        self.decay, self.smallest = decay, smallest
        self.register_buffer("mean_square", torch.ones(1))

    @property
    def scale(self) -> Tensor:
        """The root mean square, (1,)."""
        return self.mean_square.sqrt()

    def forward(self, loss: Tensor, update: bool | None = None) -> Tensor:
        """A scalar loss -> the loss divided by the scale. update: whether it is counted, by default in training."""
        scale = self.scale.clamp_min(self.smallest)[0]
        if self.training if update is None else update:
            with torch.no_grad():
                self.mean_square.lerp_(loss.detach().square().to(self.mean_square.dtype), 1 - self.decay)
        return loss / scale
