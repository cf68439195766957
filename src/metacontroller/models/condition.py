"""Norms whose scale and shift depend on a condition, such as a goal vector or the embedding of a mission.

Axes: b batch, t steps, n width, c condition.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError


class AdaptiveNorm(nn.Module):
    """Layer norm without weights of its own, y = norm(x) (1 + scale(c)) + shift(c), both linear (adaLN, DiT, arXiv
    2212.09748, section 3.2). They start at 0, so that the condition has no influence before training.

    UserError for a missing condition, or one of another width.
    """

    def __init__(self, dim: int, dim_condition: int) -> None:
        super().__init__()
        if dim_condition < 1:
            raise UserError(f"dim_condition is {dim_condition}; expected at least 1.")
        self.dim, self.dim_condition = dim, dim_condition
        self.to_scale_and_shift = nn.Linear(dim_condition, 2 * dim)
        nn.init.zeros_(self.to_scale_and_shift.weight)
        nn.init.zeros_(self.to_scale_and_shift.bias)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x (b, t, n) or (b, n), condition (b, c), or (b, t, c) for x with steps -> as x."""
        if condition is None:
            raise UserError(f"the condition is missing; this model was made with dim_condition {self.dim_condition}.")
        if condition.shape[-1] != self.dim_condition or len(condition) != len(x):
            raise UserError(
                f"condition has shape {tuple(condition.shape)}; expected ({len(x)}, {self.dim_condition}), one a row."
            )
        scale, shift = self.to_scale_and_shift(condition.to(x.dtype)).chunk(2, -1)
        if x.dim() == 3 and condition.dim() == 2:
            scale, shift = scale[:, None], shift[:, None]
        elif x.dim() == 2 and condition.dim() == 3:
            scale, shift = scale[:, 0], shift[:, 0]
        return F.layer_norm(x, (self.dim,)) * (1 + scale) + shift


def make_norm(dim: int, dim_condition: int | None) -> nn.LayerNorm | AdaptiveNorm:
    """A layer norm, or one that depends on a condition if its width is given."""
    return nn.LayerNorm(dim) if dim_condition is None else AdaptiveNorm(dim, dim_condition)


def normalized(norm: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    """norm(x), with the condition if the norm depends on one; UserError for a condition that it does not read."""
    if isinstance(norm, AdaptiveNorm):
        return norm(x, condition)
    if condition is not None:
        raise UserError(
            f"a condition of shape {tuple(condition.shape)} is given, but the model was made without dim_condition; "
            "leave it out, or make the model with dim_condition = its last size."
        )
    return norm(x)
