"""Residual networks over images, and their inverse (He et al., arXiv 1512.03385, table 1; depths 18, 34 and 50).

The stride of a bottleneck is in its 3 x 3 convolution. The decoder doubles the side five times, by nearest neighbours
and a residual block each, down from the feature map, and reads off a Gaussian of every pixel: our choice.
Axes: b images, c channels, y and x pixels, n features.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks of the four stages, by depth."""

WIDTHS = (64, 128, 256, 512)
"""Channels of the four stages; a bottleneck leaves four times as many."""

LOG_VARIANCE = (-7.0, 5.0)
"""Limits of the log variance of a pixel, so that its likelihood is bounded."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel, (b, c, y, x) -> (b, c, y, x); of single images, without a batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(images.movedim(1, -1)).movedim(-1, 1)


def make_channel_norm(channels: int, layer_norm: bool) -> nn.Module:
    """Batch norm, as in the paper, or `ChannelNorm`."""
    return ChannelNorm(channels) if layer_norm else nn.BatchNorm2d(channels)


class ResidualBlock(nn.Module):
    """relu(x + f(x)); f two 3 x 3 convolutions, or with ``bottleneck`` 1 x 1, 3 x 3 and 1 x 1. Where the shape changes,
    x passes a 1 x 1 convolution with a norm."""

    def __init__(
        self, inside: int, width: int, *, stride: int = 1, bottleneck: bool = False, layer_norm: bool = False
    ) -> None:
        super().__init__()
        outside = 4 * width if bottleneck else width
        if bottleneck:
            shapes = [(inside, width, 1, 1), (width, width, 3, stride), (width, outside, 1, 1)]
        else:
            shapes = [(inside, width, 3, stride), (width, outside, 3, 1)]
        layers: list[nn.Module] = []
        for before, after, kernel, step in shapes:
            layers.append(nn.Conv2d(before, after, kernel, stride=step, padding=kernel // 2, bias=False))
            layers += [make_channel_norm(after, layer_norm), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = None
        if stride != 1 or inside != outside:
            project = nn.Conv2d(inside, outside, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, make_channel_norm(outside, layer_norm))

    def forward(self, images: Tensor) -> Tensor:
        """(b, inside, y, x) -> (b, outside, y / stride, x / stride), rounded up."""
        return F.relu(self.layers(images) + (images if self.shortcut is None else self.shortcut(images)))


class ResNet(nn.Module):
    """Images (b, c, y, x) -> features (b, n). depth: 18, 34 or 50. features: n. UserError for another depth."""

    def __init__(self, depth: int, features: int, *, channels: int = 3, layer_norm: bool = False) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise UserError(f"the ResNet's depth is {depth}; expected one of {', '.join(map(str, BLOCKS))}.")
        bottleneck = depth >= 50
        self.stem = nn.Sequential(
            nn.Conv2d(channels, WIDTHS[0], 7, stride=2, padding=3, bias=False),
            make_channel_norm(WIDTHS[0], layer_norm),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks, inside = [], WIDTHS[0]
        for stage, (count, width) in enumerate(zip(BLOCKS[depth], WIDTHS, strict=True)):
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(ResidualBlock(inside, width, stride=stride, bottleneck=bottleneck, layer_norm=layer_norm))
                inside = 4 * width if bottleneck else width
        self.blocks = nn.Sequential(*blocks)
        self.map_channels = inside
        self.readout = nn.Linear(inside, features)

    def feature_map(self, images: Tensor) -> Tensor:
        """(b, c, y, x) -> (b, map_channels, y / 32, x / 32), rounded up."""
        return self.blocks(self.stem(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.readout(self.feature_map(images).mean((2, 3)))


class ResNetDecoder(nn.Module):
    """A Gaussian of every pixel from a feature map. inside: its channels. channels: c."""

    def __init__(self, inside: int, *, channels: int = 3, layer_norm: bool = False) -> None:
        super().__init__()
        widths = [inside, 256, 128, 64, 32, 16]
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after, layer_norm=layer_norm) for before, after in pairwise(widths)
        )
        self.readout = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(b, inside, y', x') -> mean and log variance (b, c, y, x) of images of the size (y, x)."""
        for below, block in zip(reversed(range(len(self.blocks))), self.blocks, strict=True):
            y, x = (-(-side // 2**below) for side in size)  # what lies beyond the image is left out at once
            features = block(F.interpolate(features, scale_factor=2.0)[..., :y, :x])
        mean, log_variance = self.readout(features).chunk(2, 1)
        return mean, log_variance.clamp(*LOG_VARIANCE)


def pixel_losses(mean: Tensor, log_variance: Tensor, images: Tensor) -> Tensor:
    """-log N(images; mean, variance) of each image, a mean over its pixels and channels: (b, c, y, x) each -> (b,)."""
    error = (images - mean).square() * torch.exp(-log_variance)
    return 0.5 * (log_variance + error + math.log(2 * math.pi)).mean((1, 2, 3))
