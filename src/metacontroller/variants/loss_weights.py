"""Weights of losses that change with the number of updates, and losses divided by their running root mean square."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.ranges import NotNegative, Number, check, check_fields

NUMBERS = ("kl", "kl_warmup", "ratio", "ratio_final", "ratio_warmdown")


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
        self.kl, self.kl_warmup, self.apply_kl = kl, kl_warmup, apply_kl
        self.ratio, self.ratio_warmdown = ratio, ratio_warmdown
        self.ratio_final = ratio if ratio_final is None else ratio_final
        check_fields(self, **dict.fromkeys(NUMBERS, NotNegative))
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
            return self.ratio
        return self.ratio + (self.ratio_final - self.ratio) * self._passed(self.ratio_warmdown)

    def _passed(self, duration: int) -> float:
        return min(1.0, int(self.count) / duration) if duration else 1.0


class LossScale(nn.Module):
    """Divides a loss by sqrt(m), m the exponential mean of its squares, which starts at 1 (Dreamer 4, arXiv 2509.24527,
    §3); losses then need no weights.

    A loss is divided by the scale that holds before it is counted. decay: of the mean. count: of losses, each with a
    scale of its own. UserError unless 0 < decay < 1.
    """

    mean_square: Tensor

    def __init__(self, decay: float = 0.999, smallest: float = 1e-6, *, count: int = 1) -> None:
        super().__init__()
        check("decay of a loss's scale", decay, Number(0, 1, above=True, below=True))
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
