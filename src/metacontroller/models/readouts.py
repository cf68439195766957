"""Embeddings and readouts of actions and states: categorical and Gaussian (paper §1).

A readout maps the last residual to the parameters of a distribution, and computes log-probabilities and samples of it.
A readout of actions can also embed past actions; states are embedded by encoders.
Axes: b batch, t steps, n model width, a action or state size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metacontroller.errors import UserError


class CategoricalReadout(nn.Module):
    """Softmax over ``num_discrete`` choices. embeds: whether it also embeds past actions."""

    def __init__(self, dim: int, num_discrete: int, *, embeds: bool = False) -> None:
        super().__init__()
        if num_discrete < 2:
            raise UserError(f"num_discrete is {num_discrete}; a choice needs at least 2.")
        self.num_discrete = num_discrete
        self.linear = nn.Linear(dim, num_discrete)
        if embeds:
            self.embedding = nn.Embedding(num_discrete, dim)
            nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (b, t, n) -> logits (b, t, a)."""
        return self.linear(hidden)

    def embed(self, values: Tensor) -> Tensor:
        """values (b, t) int64 -> (b, t, n)."""
        return self.embedding(values)

    def log_prob(self, logits: Tensor, values: Tensor) -> Tensor:
        """Log-probability of each value, (b, t)."""
        return -F.cross_entropy(logits.flatten(0, -2), values.flatten(), reduction="none").view(values.shape)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One sample per step, (b, t) int64, by the Gumbel-max trick, which does not synchronize with the device."""
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
        gumbel = -torch.log((-torch.log(uniform.clamp_min(1e-20))).clamp_min(1e-20))
        return (logits.float() + gumbel).argmax(-1)

    def check(self, values: Tensor, steps: tuple[int, int]) -> None:
        """UserError unless ``values`` are int64 of shape ``steps`` (b, t), within 0..num_discrete-1."""
        if values.shape != steps or values.dtype != torch.int64:
            raise UserError(
                f"actions have shape {tuple(values.shape)} and dtype {values.dtype}; expected torch.int64 {steps}."
            )
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self.num_discrete:
            raise UserError(f"actions range over {low}..{high}; each must lie in 0..{self.num_discrete - 1}.")


class CategoriesReadout(nn.Module):
    """Independent softmaxes over the entries of an observation, for states only; sizes: choices of each entry."""

    def __init__(self, dim: int, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.linear = nn.Linear(dim, sum(sizes))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (b, t, n) -> logits (b, t, sum of sizes), entry by entry."""
        return self.linear(hidden)

    def log_prob(self, logits: Tensor, values: Tensor) -> Tensor:
        """Log-probability of each observation, values (b, t, entries) int64 -> (b, t): summed over its entries."""
        parts = logits.split(self.sizes, -1)
        chosen = [
            part.gather(-1, value[..., None])[..., 0] - part.logsumexp(-1)
            for part, value in zip(parts, values.unbind(-1), strict=True)
        ]
        return torch.stack(chosen).sum(0)


MIN_LOG_STD, MAX_LOG_STD = -5.0, 2.0
"""Limits of a `GaussianReadout`'s log standard deviation."""


class GaussianReadout(nn.Module):
    """Diagonal Gaussian over ``num_continuous`` values; parameters are (mean, log standard deviation) side by side.

    The log standard deviation is clamped to `MIN_LOG_STD`..`MAX_LOG_STD` (our choice; the paper has no limits). Without
    a limit, the likelihood of values that the model predicts exactly grows without bound. With it, the loss of a value
    is at least MIN_LOG_STD + log(2 pi) / 2. embeds: whether it also embeds past actions.
    """

    def __init__(self, dim: int, num_continuous: int, *, embeds: bool = False) -> None:
        super().__init__()
        if num_continuous < 1:
            raise UserError(f"num_continuous is {num_continuous}; expected at least 1.")
        self.num_continuous = num_continuous
        self.linear = nn.Linear(dim, 2 * num_continuous)
        if embeds:
            self.embedding = nn.Linear(num_continuous, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (b, t, n) -> (b, t, 2 a): mean, then log standard deviation within its limits."""
        mean, log_std = self.linear(hidden).chunk(2, -1)
        return torch.cat([mean, clamp_with_inward_gradient(log_std, MIN_LOG_STD, MAX_LOG_STD)], -1)

    def embed(self, values: Tensor) -> Tensor:
        """values (b, t, a) -> (b, t, n); values are cast to the weights' floating-point type."""
        return self.embedding(values.to(self.embedding.weight.dtype))

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        """Log-density of each value, summed over its entries, (b, t)."""
        return gaussian_log_prob(params, values).sum(-1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One sample per step, (b, t, a)."""
        return sample_gaussian(params, generator)

    def check(self, values: Tensor, steps: tuple[int, int]) -> None:
        """UserError unless ``values`` are finite floats of shape (*steps, a), where ``steps`` is (b, t)."""
        expected = (*steps, self.num_continuous)
        if values.shape != expected or not values.is_floating_point():
            raise UserError(
                f"actions have shape {tuple(values.shape)} and dtype {values.dtype}; "
                f"expected floating-point {expected}."
            )
        if not bool(torch.isfinite(values).all()):
            raise UserError("actions hold NaN or infinite values; clean the data before training.")


def clamp_with_inward_gradient(values: Tensor, low: float, high: float) -> Tensor:
    """Clamps values to low..high; outside, only gradients that push a value back towards the limits pass.

    A plain clamp has no gradient outside its limits, so that a value there could never return.
    """
    return _ClampWithInwardGradient.apply(values, low, high)  # pyright: ignore[reportReturnType]


class _ClampWithInwardGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(values)
        ctx.limits = low, high
        return values.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (values,), (low, high) = ctx.saved_tensors, ctx.limits
        outward = ((values < low) & (gradient > 0)) | ((values > high) & (gradient < 0))  # of the step -gradient
        return gradient.masked_fill(outward, 0), None, None


def sample_gaussian(params: Tensor, generator: torch.Generator | None = None, *, noise: Tensor | None = None) -> Tensor:
    """One reparameterised sample per Gaussian: params (..., 2 a), mean then log standard deviation -> (..., a).

    noise (..., a): standard normal, sampled here if not given.
    """
    mean, log_std = params.chunk(2, -1)
    if noise is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + log_std.exp() * noise


def gaussian_log_prob(params: Tensor, values: Tensor) -> Tensor:
    """Log-density of each entry: params (..., 2 a), values (..., a) -> (..., a)."""
    mean, log_std = params.chunk(2, -1)
    return -0.5 * ((values - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)


def make_readout(
    dim: int, name: str, options: dict[str, Any], *, embeds: bool = False
) -> CategoricalReadout | GaussianReadout:
    """The readout for ``dict(num_discrete = ...)`` or ``dict(num_continuous = ...)``; UserError for other options."""
    if set(options) == {"num_discrete"}:
        return CategoricalReadout(dim, options["num_discrete"], embeds=embeds)
    if set(options) == {"num_continuous"}:
        return GaussianReadout(dim, options["num_continuous"], embeds=embeds)
    raise UserError(f"{name} is {options!r}; expected dict(num_discrete = ...) or dict(num_continuous = ...).")
