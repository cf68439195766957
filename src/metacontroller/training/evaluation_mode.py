"""Modules that do not learn, or learn without dropout, and through which gradients pass all the same."""

from __future__ import annotations

from torch import nn


def evaluation_mode(module: nn.Module) -> None:
    """`module.eval()`, but for recurrent layers without dropout, which compute the same in either mode: on a GPU, cuDNN
    takes gradients through them in training mode alone."""
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase) and not layer.dropout:
            layer.train()
