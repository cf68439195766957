"""Embeddings and readouts of actions and states: one choice, several, Gaussian (paper §1), and a mixture of Gaussians.

A readout maps the last residual to the parameters of a distribution, and computes log-probabilities and samples of it.
A readout of actions can also embed past actions; states are embedded by encoders.
Axes: b batch, t steps, n model width, a action or state size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.ranges import MOST_COUNT, MOST_ROWS, ROWS, Number, Whole, check_each, check_number


class CategoricalReadout(nn.Module):
    """Softmax over ``num_discrete`` choices. embeds: whether it also embeds past actions."""

    def __init__(self, dim: int, num_discrete: int, *, embeds: bool = False) -> None:
        super().__init__()
        check_number("num_discrete", num_discrete, Whole(-MOST_COUNT, MOST_ROWS))
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

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy in nats, (..., num_discrete) -> (...)."""
        return _categorical_entropy(logits)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """One sample per step, (b, t) int64, by the Gumbel-max trick, which does not synchronize with the device.

        temperature: divides the logits; 0 takes the likeliest.
        """
        return (logits.float() + temperature * gumbel_noise(logits, generator)).argmax(-1)

    def check(self, values: Tensor, steps: tuple[int, int]) -> None:
        """UserError unless ``values`` are int64 of shape ``steps`` (b, t), within 0..num_discrete-1."""
        if values.shape != steps or values.dtype != torch.int64:
            raise UserError(
                f"actions have shape {tuple(values.shape)} and dtype {values.dtype}; expected torch.int64 {steps}."
            )
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self.num_discrete:
            raise UserError(f"actions range over {low}..{high}; each must lie in 0..{self.num_discrete - 1}.")


def gumbel_noise(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape of logits, float32."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
    return -torch.log((-torch.log(uniform.clamp_min(1e-20))).clamp_min(1e-20))


def _categorical_entropy(logits: Tensor) -> Tensor:
    log_prob = logits.log_softmax(-1)
    return -(log_prob.exp() * log_prob).sum(-1)


class MultiCategoricalReadout(nn.Module):
    """Several choices at once, each a softmax of its own. num_discrete: values of each of the k choices.

    embeds: whether it also embeds past actions. UserError for numbers below 1.
    """

    offsets: Tensor

    def __init__(self, dim: int, num_discrete: Sequence[int], *, embeds: bool = False) -> None:
        super().__init__()
        if not num_discrete or any(ROWS.expected(number) for number in num_discrete):
            raise UserError(
                f"num_discrete is {list(num_discrete)}; expected at least one whole number, each at least 1."
            )
        self.num_discrete = tuple(num_discrete)
        self.linear = nn.Linear(dim, sum(num_discrete))
        self.register_buffer("offsets", block_starts(self.num_discrete), persistent=False)
        if embeds:
            self.embedding = nn.Embedding(sum(num_discrete), dim)
            nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (b, t, n) -> logits (b, t, sum of num_discrete), choice after choice."""
        return self.linear(hidden)

    def embed(self, values: Tensor) -> Tensor:
        """values (b, t, k) int64 -> (b, t, n)."""
        return self.embedding(values + self.offsets).sum(-2)

    def log_prob(self, logits: Tensor, values: Tensor) -> Tensor:
        """Joint log-probability of each step's choices, (b, t)."""
        normalized = [block.log_softmax(-1) for block in logits.split(self.num_discrete, -1)]
        return torch.cat(normalized, -1).gather(-1, values + self.offsets).sum(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy in nats of all choices together, (..., sum of num_discrete) -> (...)."""
        return torch.stack([_categorical_entropy(block) for block in logits.split(self.num_discrete, -1)]).sum(0)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """One sample per step, (b, t, k) int64, by the Gumbel-max trick; temperature: divides the logits."""
        perturbed = logits.float() + temperature * gumbel_noise(logits, generator)
        return torch.stack([block.argmax(-1) for block in perturbed.split(self.num_discrete, -1)], -1)

    def check(self, values: Tensor, steps: tuple[int, int]) -> None:
        """UserError unless ``values`` are int64 of shape (*steps, k), each below its number of values."""
        expected = (*steps, len(self.num_discrete))
        if values.shape != expected or values.dtype != torch.int64:
            raise UserError(
                f"actions have shape {tuple(values.shape)} and dtype {values.dtype}; expected torch.int64 {expected}."
            )
        if not bool(((values >= 0) & (values < values.new_tensor(self.num_discrete))).all()):
            raise UserError(f"actions are out of range; expected 0 to below {list(self.num_discrete)} each.")


def block_starts(sizes: Sequence[int]) -> Tensor:
    """Where each of several blocks that lie one after the other begins, (k,) int64."""
    return torch.tensor([0, *sizes[:-1]]).cumsum(0)


MIN_LOG_STD, MAX_LOG_STD = -5.0, 2.0
"""Limits of a `GaussianReadout`'s log standard deviation."""
MIN_STD = Number(math.exp(MIN_LOG_STD), math.exp(MAX_LOG_STD), none=True)
MOST_MODES = 1024


class GaussianReadout(nn.Module):
    """Diagonal Gaussian over ``num_continuous`` values; parameters are (mean, log standard deviation) side by side.

    The log standard deviation is clamped to `MIN_LOG_STD`..`MAX_LOG_STD` (our choice; the paper has no limits). Without
    a limit, the likelihood of values that the model predicts exactly grows without bound. With it, the loss of a value
    is at least MIN_LOG_STD + log(2 pi) / 2. embeds: whether it also embeds past actions.
    mean, std (a,): of the data; then the limits, and the embedding, are those of standardized values. Parameters,
    values and samples are in the data's own units in any case. min_std: a higher lower limit of the deviation.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        dim: int,
        num_continuous: int,
        *,
        embeds: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        min_std: float | None = None,
    ) -> None:
        super().__init__()
        check_number("num_continuous", num_continuous, ROWS)
        check_number("min_std", min_std, MIN_STD)
        self.num_continuous = num_continuous
        self.min_log_std = MIN_LOG_STD if min_std is None else math.log(min_std)
        register_statistics(self, num_continuous, mean, std)
        self.linear = nn.Linear(dim, 2 * num_continuous)
        if embeds:
            self.embedding = nn.Linear(num_continuous, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (b, t, n) -> (b, t, 2 a): mean, then log standard deviation within its limits."""
        return self._limited(self.linear(hidden))

    def _limited(self, params: Tensor) -> Tensor:
        """What the linear map says (..., 2 a), as parameters of Gaussians in the data's units."""
        mean, log_std = params.chunk(2, -1)
        log_std = clamp_with_inward_gradient(log_std, self.min_log_std, MAX_LOG_STD)
        if self.mean is not None and self.std is not None:
            mean, log_std = self.mean + self.std * mean, log_std + self.std.log()
        return torch.cat([mean, log_std], -1)

    def embed(self, values: Tensor) -> Tensor:
        """values (b, t, a) -> (b, t, n); values are cast to the weights' floating-point type."""
        values = values.to(self.embedding.weight.dtype)
        if self.mean is not None and self.std is not None:
            values = (values - self.mean) / self.std
        return self.embedding(values)

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        """Log-density of each value, summed over its entries, (b, t)."""
        return gaussian_log_prob(params, values).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Differential entropy in nats, (..., 2 num_continuous) -> (...)."""
        log_std = params.chunk(2, -1)[1]
        return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """One sample per step, (b, t, a), in at least float32; temperature: multiplies the standard deviation."""
        params = params.to(torch.promote_types(params.dtype, torch.float32))
        mean = params.chunk(2, -1)[0]
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return sample_gaussian(params, noise=noise if temperature == 1 else temperature * noise)

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


class GaussianMixtureReadout(GaussianReadout):
    """Mixture of ``modes`` diagonal Gaussians over ``num_continuous`` values (our choice; the paper has one Gaussian).

        p(a) = sum_k w_k N(a; mean_k, diag std_k^2)

    Where experts may do one thing or another, the mean of a single Gaussian is neither; a mixture has a mode for each,
    and its weights are a choice, as a softmax over discrete actions is (docs/log.md, 92). Parameters are the log
    weights (k), then each Gaussian's (k times 2 a). The other arguments, and the limits, are those of
    `GaussianReadout`. UserError for fewer than 2 modes.
    """

    choice_weight = 1.0
    """By how much the gradient of the log weights is multiplied, see `emphasized_choices`."""

    def __init__(self, dim: int, num_continuous: int, *, modes: int, **options: Any) -> None:
        check_number("modes", modes, Whole(2, MOST_MODES))
        super().__init__(dim, num_continuous, **options)
        self.modes = modes
        self.linear = nn.Linear(dim, modes * (1 + 2 * num_continuous))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (b, t, n) -> (b, t, k + k 2 a)."""
        weights, gaussians = self.linear(hidden).split(self._sizes(), -1)
        limited = self._limited(gaussians.unflatten(-1, (self.modes, -1)))
        if self.choice_weight != 1:
            weights = weights + (self.choice_weight - 1) * (weights - weights.detach())
        return torch.cat([weights.log_softmax(-1), limited.flatten(-2)], -1)

    def parts(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights (..., k), and the parameters of the Gaussians (..., k, 2 a)."""
        weights, gaussians = params.split(self._sizes(), -1)
        return weights, gaussians.unflatten(-1, (self.modes, -1))

    def _sizes(self) -> list[int]:
        return [self.modes, self.modes * 2 * self.num_continuous]

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        """Log-density of each step's values, (b, t)."""
        weights, gaussians = self.parts(params)
        return torch.logsumexp(weights + gaussian_log_prob(gaussians, values[..., None, :]).sum(-1), -1)

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy in nats of mode and value together, (..., k + k 2 a) -> (...): that of the values is no higher, and
        as high where the modes lie apart. It has no closed form."""
        weights, gaussians = self.parts(params)
        return _categorical_entropy(weights) + (weights.exp() * super().entropy(gaussians)).sum(-1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """One sample per step, (b, t, a); temperature: divides the log weights and multiplies the standard deviations;
        0 takes the mean of the likeliest mode."""
        weights, gaussians = self.parts(params)
        mode = (weights.float() + temperature * gumbel_noise(weights, generator)).argmax(-1)[..., None, None]
        chosen = gaussians.gather(-2, mode.expand(*mode.shape[:-1], gaussians.shape[-1])).squeeze(-2)
        return super().sample(chosen, generator, temperature=temperature)


@contextmanager
def emphasized_choices(readout: nn.Module, weight: float) -> Iterator[None]:
    """Within it, the gradient of a mixture's log weights is multiplied by ``weight`` (our choice).

    With responsibilities r of the modes for a value, the gradient of -log p with respect to the logits is w - r. This
    adds (weight - 1) times the cross-entropy of w under r to it, and changes no value. Where an expert seldom chooses,
    the choice is a small part of the loss, and is learned late without it. UserError for another readout, unless the
    weight is 1.
    """
    if weight == 1:
        yield
        return
    if not isinstance(readout, GaussianMixtureReadout):
        raise UserError(
            f"choice_weight is {weight}, but actions are no mixture of Gaussians; set it to 1, or action_modes above 1."
        )
    before, readout.choice_weight = readout.choice_weight, weight
    try:
        yield
    finally:
        readout.choice_weight = before


def register_statistics(
    module: nn.Module, size: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Gives a module the buffers ``mean`` and ``std`` (size,), None without statistics.

    They are saved with the module's arguments. UserError for wrong sizes, and for standard deviations that are not
    positive.
    """
    values = {"mean": mean, "std": std}
    for name, numbers in values.items():
        if (numbers is None) != (mean is None) or (numbers is not None and len(numbers) != size):
            raise UserError(f"{name} is {numbers!r}; expected {size} numbers, for mean and std both or neither.")
        check_each(name, () if numbers is None else numbers, Number())
        tensor = None if numbers is None else torch.tensor(numbers, dtype=torch.get_default_dtype())
        module.register_buffer(name, tensor, persistent=False)
    if std is not None and not min(std) > 0:
        raise UserError(f"std holds {min(std)}; expected positive numbers.")


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


Readout = CategoricalReadout | MultiCategoricalReadout | GaussianReadout


def make_readout(dim: int, name: str, options: dict[str, Any], *, embeds: bool = False) -> Readout:
    """The readout for ``dict(num_discrete = ...)``, a number or a list of them for several choices at once, or
    ``dict(num_continuous = ...)``, with ``mean`` and ``std`` if need be, ``min_std``, and ``modes`` for a mixture;
    UserError for other options."""
    if isinstance(options, dict) and set(options) == {"num_discrete"}:
        number = options["num_discrete"]
        if isinstance(number, Iterable) and not isinstance(number, str):
            return MultiCategoricalReadout(dim, list(number), embeds=embeds)
        return CategoricalReadout(dim, options["num_discrete"], embeds=embeds)
    if isinstance(options, dict) and set(options) - {"modes", "min_std"} in (
        {"num_continuous"},
        {"num_continuous", "mean", "std"},
    ):
        kind = GaussianMixtureReadout if "modes" in options else GaussianReadout
        return kind(dim, **options, embeds=embeds)
    raise UserError(f"{name} is {options!r}; expected dict(num_discrete = ...) or dict(num_continuous = ...).")
