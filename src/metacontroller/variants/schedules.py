"""Weights of the KL and of the ratio loss that change with the number of updates, kept in the module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError


class LossWeights(nn.Module):
    """The weight of the KL rises linearly from 0 over ``kl_warmup`` updates, that of the ratio loss goes from
    ``ratio`` to ``ratio_final`` over ``ratio_warmdown``.

    apply_kl: whether the KL is multiplied by its weight, or left to the caller. The count of updates is saved with the
    weights. UserError for negative numbers.
    """

    count: Tensor

    def __init__(
        self,
        *,
        kl: float = 1.0,
        kl_warmup: int = 0,
        ratio: float = 1.0,
        ratio_final: float | None = None,
        ratio_warmdown: int = 0,
        apply_kl: bool = True,
    ) -> None:
        super().__init__()
        numbers = {"kl": kl, "kl_warmup": kl_warmup, "ratio": ratio, "ratio_warmdown": ratio_warmdown}
        for name, value in {**numbers, "ratio_final": ratio_final or 0}.items():
            if value < 0:
                raise UserError(f"the weight or duration {name} is {value}; expected at least 0.")
        self.kl, self.kl_warmup, self.apply_kl = kl, kl_warmup, apply_kl
        self.ratio_start, self.ratio_warmdown = ratio, ratio_warmdown
        self.ratio_final = ratio if ratio_final is None else ratio_final
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def step(self) -> None:
        """Counts one update."""
        self.count += 1

    def reset(self) -> None:
        """Begins again."""
        self.count.zero_()

    @property
    def current_kl(self) -> float:
        """Weight of the KL now."""
        return self.kl * self._passed(self.kl_warmup)

    @property
    def applied_kl(self) -> float:
        """What the KL is multiplied by."""
        return self.current_kl if self.apply_kl else 1.0

    @property
    def current_ratio(self) -> float:
        """Weight of the ratio loss now."""
        if self.ratio_warmdown == 0:
            return self.ratio_start
        return self.ratio_start + (self.ratio_final - self.ratio_start) * self._passed(self.ratio_warmdown)

    def _passed(self, duration: int) -> float:
        return min(1.0, int(self.count) / duration) if duration else 1.0
