"""Encoder of symbolic grids, as MiniGrid shows them: a square of cells, each with a type, a color and a state.

Axes: b batch, t steps, s side, k channels, n model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.models.readouts import MultiCategoricalReadout, block_starts


class GridBlock(nn.Module):
    """A ConvNeXt block (arXiv 2201.03545, section 2): depthwise convolution, norm, MLP over channels, residual."""

    def __init__(self, dim: int, *, kernel: int = 3, expansion: int = 4) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp_in, self.mlp_out = nn.Linear(dim, expansion * dim), nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (m, n, s, s) -> as x."""
        mixed = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.mlp_out(F.gelu(self.mlp_in(mixed))).permute(0, 3, 1, 2)


class SymbolicGridEncoder(nn.Module):
    """Embeds each cell's channels, mixes cells by convolutions, and takes the mean over cells.

    sizes: categories of each channel, such as 11 types, 6 colors, 3 states. side: cells along a side. The readout
    predicts every channel of every cell. UserError for sizes below 1, or an even kernel.
    """

    offsets: Tensor
    limits: Tensor

    def __init__(
        self, dim: int, *, sizes: Sequence[int] = (11, 6, 3), side: int = 7, depth: int = 4, kernel: int = 3
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1 or side < 1 or depth < 0:
            raise UserError(f"sizes are {list(sizes)}, side {side} and depth {depth}; expected positive numbers.")
        if kernel % 2 == 0:
            raise UserError(f"kernel is {kernel}; expected an odd number of cells.")
        self.sizes, self.side = list(sizes), side
        self.register_buffer("offsets", block_starts(self.sizes), persistent=False)
        self.register_buffer("limits", torch.tensor(self.sizes), persistent=False)
        self.table = nn.Embedding(sum(self.sizes), dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(GridBlock(dim, kernel=kernel) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, states: Tensor) -> Tensor:
        """states (b, t, s, s, k) int64 -> (b, t, n)."""
        self._check_shape(states)
        x = self.table(states + self.offsets).sum(-2).flatten(0, 1).permute(0, 3, 1, 2)  # (b t, n, s, s)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)).unflatten(0, states.shape[:2])

    def state_readout(self, dim: int) -> MultiCategoricalReadout:
        """The readout that predicts every channel of every cell of the next grid."""
        return MultiCategoricalReadout(dim, self.sizes * self.side**2)

    def targets(self, states: Tensor) -> Tensor:
        """The targets of ``state_readout`` in states (b, t, s, s, k): cell by cell, (b, t, s² k)."""
        return states.flatten(2)

    def from_observation(self, observation: Any) -> Tensor:
        """Converts one grid to one state, without batch and time axes."""
        return torch.as_tensor(observation, dtype=torch.int64)

    def check(self, states: Tensor) -> None:
        """UserError unless the states are grids of categories; synchronizes with the device."""
        self._check_shape(states)
        if not bool(((states >= 0) & (states < self.limits)).all()):
            raise UserError(f"a grid is out of range; expected 0 to below {self.sizes} in its channels.")

    def _check_shape(self, states: Tensor) -> None:
        expected = (self.side, self.side, len(self.sizes))
        if states.shape[2:] != expected or states.dtype != torch.int64:
            raise UserError(
                f"state has shape {tuple(states.shape)} and dtype {states.dtype}; expected int64 (b, t, "
                f"{', '.join(map(str, expected))}): a grid of cells with channels."
            )
