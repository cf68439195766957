"""Residual networks: their known sizes, blocks against the formula in float64, and pixels that are predicted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.variants.resnet import ResidualBlock, ResNet, ResNetDecoder, pixel_losses


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_sizes_are_those_known_for_1000_classes(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        net = ResNet(depth, 1000)
    assert sum(value.numel() for value in net.parameters()) == parameters


def slow_norm(x: Tensor, layer_norm: bool) -> Tensor:
    """Zero mean and unit variance over the channels of a pixel, or over batch and pixels of a channel."""
    axes = (1,) if layer_norm else (0, 2, 3)
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_is_its_formula(bottleneck: bool, layer_norm: bool, stride: int) -> None:
    outside = 12 if bottleneck else 3
    block = ResidualBlock(outside, 3, stride=stride, bottleneck=bottleneck, layer_norm=layer_norm).double()
    assert (block.shortcut is None) == (stride == 1)
    images = torch.randn(2, outside, 5, 5, dtype=torch.float64, requires_grad=True)
    convolutions = [layer for layer in block.layers if isinstance(layer, torch.nn.Conv2d)]
    x = images
    for index, layer in enumerate(convolutions):
        kernel, at = layer.weight.shape[-1], stride if layer.stride[0] == 2 else 1
        assert kernel == ((1, 3, 1) if bottleneck else (3, 3))[index]
        padded = F.pad(x, [kernel // 2] * 4)
        patches = padded.unfold(2, kernel, at).unfold(3, kernel, at)
        x = slow_norm(torch.einsum("bcyxij,ocij->boyx", patches, layer.weight), layer_norm)
        x = x.relu() if index < len(convolutions) - 1 else x
    past = images
    if block.shortcut is not None:
        weight = block.shortcut[0].weight[:, :, 0, 0]  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
        past = slow_norm(torch.einsum("bcyx,oc->boyx", images[:, :, ::stride, ::stride], weight), layer_norm)
    slow, fast = (past + x).relu(), block(images)
    torch.testing.assert_close(fast, slow)
    weights = [images, *(layer.weight for layer in convolutions)]
    gradients = (torch.autograd.grad(out.square().sum(), weights) for out in (fast, slow))
    torch.testing.assert_close(*gradients)


def test_features_are_read_from_the_mean_of_the_map_and_pixels_from_the_map() -> None:
    net, decoder = ResNet(18, 5, layer_norm=True), ResNetDecoder(512, layer_norm=True)
    images = torch.rand(2, 3, 40, 33)
    found = net.feature_map(images)
    assert found.shape == (2, 512, 2, 2)
    torch.testing.assert_close(net(images), net.readout(found.mean((2, 3))))
    mean, log_variance = decoder(found, (40, 33))
    assert mean.shape == log_variance.shape == images.shape
    losses = pixel_losses(mean, log_variance, images)
    spread = torch.distributions.Normal(mean, (log_variance / 2).exp())
    torch.testing.assert_close(losses, -spread.log_prob(images).mean((1, 2, 3)))
    best = pixel_losses(images, torch.full_like(images, -7.0), images)
    torch.testing.assert_close(best, torch.full((2,), 0.5 * (math.log(2 * math.pi) - 7)))


def test_another_depth_is_named() -> None:
    with pytest.raises(UserError, match="depth is 20; expected one of 18, 34, 50"):
        ResNet(20, 5)
