"""Losses divided by their running root mean square, which then need no weights (Dreamer 4, arXiv 2509.24527, §3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError


class LossScale(nn.Module):
    """Divides a loss by sqrt(m), m the exponential mean of its squares, which starts at 1.

    A loss is divided by the scale that holds before it is counted. decay: of the mean. count: of losses, each with a
    scale of its own. UserError unless 0 < decay < 1.
    """

    mean_square: Tensor

    def __init__(self, decay: float = 0.999, smallest: float = 1e-6, *, count: int = 1) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise UserError(f"the decay of a loss's scale is {decay}; expected a number between 0 and 1.")
        self.decay, self.smallest = decay, smallest
        self.register_buffer("mean_square", torch.ones(count))

    @property
    def scale(self) -> Tensor:
        """The root mean square, (count,)."""
        return self.mean_square.sqrt()

    def forward(self, loss: Tensor, update: bool | None = None) -> Tensor:
        """A scalar loss, or (count,), -> divided by the scale. update: whether it is counted, by default in training.

        UserError for another number of losses.
        """
        if loss.numel() != self.mean_square.numel():
            raise UserError(f"losses have shape {tuple(loss.shape)}; expected {self.mean_square.numel()} of them.")
        scale = self.scale.clamp_min(self.smallest).view(loss.shape)
        if self.training if update is None else update:
            with torch.no_grad():
                squared = loss.detach().square().to(self.mean_square.dtype).view_as(self.mean_square)
                self.mean_square.lerp_(squared, 1 - self.decay)
        return loss / scale
