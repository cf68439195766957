"""What attention and Hawk blocks share: norms that may depend on a condition, the MLP, and the stack they stand in.

Axes: b batch, t steps, n model width, c condition, such as a goal vector or the embedding of a mission.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError


class Norm(nn.LayerNorm):
    """Layer norm. With ``dim_condition`` its scale and shift are linear maps of a condition, y = norm(x) (1 + scale(c))
    + shift(c) (adaLN, DiT, arXiv 2212.09748, section 3.2); they start at 0, so that it has no influence at first.

    UserError for a missing condition, one of another width, or one that it does not read.
    """

    def __init__(self, dim: int, dim_condition: int | None = None) -> None:
        super().__init__(dim, elementwise_affine=dim_condition is None)
        self.dim_condition = dim_condition
        if dim_condition is not None:
            self.to_scale_and_shift = nn.Linear(dim_condition, 2 * dim)
            nn.init.zeros_(self.to_scale_and_shift.weight)
            nn.init.zeros_(self.to_scale_and_shift.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (b, t, n) or (b, n), condition (b, c), or (b, t, c) for x with steps -> as x."""
        normalized = super().forward(x)
        if self.dim_condition is None and condition is None:
            return normalized
        if condition is None:
            raise UserError(f"the condition is missing; this model was made with dim_condition {self.dim_condition}.")
        given = f"condition of shape {tuple(condition.shape)} is given, but"
        if self.dim_condition is None:
            raise UserError(f"a {given} the model was made without dim_condition; leave it out.")
        if condition.shape[-1] != self.dim_condition or len(condition) != len(x):
            raise UserError(f"a {given} the model reads ({len(x)}, {self.dim_condition}), one a row.")
        scale, shift = self.to_scale_and_shift(condition.to(x.dtype)).chunk(2, -1)
        if x.dim() == 3 and condition.dim() == 2:
            scale, shift = scale[:, None], shift[:, None]
        elif x.dim() == 2 and condition.dim() == 3:
            scale, shift = scale[:, 0], shift[:, 0]
        return normalized * (1 + scale) + shift


class Block(nn.Module):
    """The second half of a block, x + mlp(norm(x)), MLP with ReLU. A subclass adds the first, which mixes steps."""

    def _make_mlp(self, dim: int, mlp_dim: int, dim_condition: int | None) -> None:
        self.mlp_norm = Norm(dim, dim_condition)
        self.mlp_in, self.mlp_out = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)

    def _add_mlp(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x, condition))))


class Body(nn.Module):
    """A stack of blocks; depth 0 returns its input. A subclass defines ``forward`` and the caches.

    sizes: of the blocks, whose equality lets bodies exchange blocks. layout: what caches have in common that it can go
    on from. UserError for sizes that do not fit.
    """

    sizes: dict[str, int]
    layout: tuple[Any, ...]
    blocks: nn.ModuleList

    def forward(self, x: Tensor, cache: Any = None, *, condition: Tensor | None = None) -> Tensor:
        """x (b, t, n) -> (b, t, n); with a cache, x follows its steps. condition (b, c), if made for one."""
        raise NotImplementedError

    def limit_context(self, steps: int) -> None:
        """From now on, what reads the past directly reads the last ``steps`` alone; by default nothing does."""

    def empty_cache(self, batch: int, capacity: int = 32) -> Any:
        """An empty cache for ``batch`` rows, with room for ``capacity`` steps before it has to grow."""
        raise NotImplementedError

    def cache_store(self, batch: int, device: torch.device) -> Any:
        """The caches of ``batch`` rows that do not step together, see `SteerableModel.cache_store`."""
        raise NotImplementedError


def variance_scaling_(weight: Tensor, scale: float = 0.1) -> None:
    """Normal with variance scale / fan_in, the paper's initialisation (§D.1)."""
    nn.init.normal_(weight, std=math.sqrt(scale / weight.shape[1]))
