"""Encoder of uint8 images.

Axes: b batch, t steps, m images, n model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.data.spaces import channel_axis
from metacontroller.models.state_encoder import StateEncoder
from metacontroller.models.values import register_statistics
from metacontroller.ranges import MOST_WIDTH, Whole, require

MAX_CHANNELS = 64
MAX_SIDE = 8
"""Side to which an image is halved before a linear map reads it, and of the picture that the state loss predicts."""
MAX_IMAGES = 2048
"""Images that are read at once, so that memory does not grow with the batch where no gradient is asked for."""


class ImageEncoder(StateEncoder):
    """A small convolutional network over uint8 images: convolutions of stride 2 until no side is longer than 8.

    shape: of one image, (height, width), (height, width, channels) or (channels, height, width); of its first and last
    axis the shorter one are the channels. mean, std (channels,): of the data, by which pixels are normalized: a grid of
    a few small numbers is no picture, and would be all but black. Without them 0..255 becomes 0..1. The readout
    predicts the next image, averaged over a grid of at most 8 x 8 fields. UserError for other shapes.
    """

    dtype = torch.uint8
    contents = "images"
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        dim: int,
        shape: Sequence[int],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        side = Whole(most=MOST_WIDTH)
        fits = not isinstance(shape, str) and len(shape) in (2, 3) and not any(map(side.expected, shape))
        require(fits, "image", shape, "(height, width), with channels first or last")
        self.shape = tuple(shape)
        self.channels_first = channel_axis(self.shape) == 0
        channels, *sides = self._channels_first(torch.zeros(self.shape)).shape
        register_statistics(self, channels, mean, std)
        self.pooled = min(sides[0], MAX_SIDE), min(sides[1], MAX_SIDE)
        self.predicted = {"num_continuous": channels * self.pooled[0] * self.pooled[1]}
        layers: list[nn.Module] = []
        width, stride = 16, 1 if max(sides) <= MAX_SIDE else 2
        while not layers or max(sides) > MAX_SIDE:
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU()]
            sides = [-(-side // stride) for side in sides]
            channels, width = width, min(2 * width, MAX_CHANNELS)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * sides[0] * sides[1], dim))

    def forward(self, states: Tensor) -> Tensor:
        self.check_shape(states)
        parts = states.flatten(0, 1).split(MAX_IMAGES)
        return torch.cat([self.body(self._scaled(part)) for part in parts]).unflatten(0, states.shape[:2])

    def targets(self, states: Tensor) -> Tensor:
        """Means of fields, scaled, side by side, (b, t, fields)."""
        parts = states.flatten(0, 1).split(MAX_IMAGES)
        pooled = torch.cat([F.adaptive_avg_pool2d(self._scaled(part), self.pooled) for part in parts])
        return pooled.flatten(1).unflatten(0, states.shape[:2])

    def _scaled(self, images: Tensor) -> Tensor:
        """(m, *shape) uint8 -> (m, channels, height, width), normalized, or from 0 to 1."""
        pixels = self._channels_first(images).to(next(self.body.parameters()).dtype)
        if self.mean is not None and self.std is not None:
            return (pixels - self.mean[:, None, None]) / self.std[:, None, None]
        return pixels / 255

    def _channels_first(self, images: Tensor) -> Tensor:
        if len(self.shape) == 2:
            return images.unsqueeze(-3)
        return images if self.channels_first else images.movedim(-1, -3)
