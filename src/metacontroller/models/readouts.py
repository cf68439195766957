"""Readouts: distributions over actions and states, as choices, Gaussians (paper §1), mixtures of them, or both kinds.

Axes: b batch, t steps, n model width, p parameters of a distribution, a action or state size, k choices or modes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.models.values import block_starts, check_values, register_statistics
from metacontroller.ranges import MOST_ROWS, Number, Rows, Whole, require

MIN_LOG_STD, MAX_LOG_STD = -5.0, 2.0
"""Limits of a `GaussianReadout`'s log standard deviation."""
MinStd = Annotated[float, Number(math.exp(MIN_LOG_STD), math.exp(MAX_LOG_STD))]
MOST_MODES = 1024


class Readout(nn.Module):
    """Maps the last residual to the parameters of a distribution over values: actions, or what is predicted of states.

    A subclass defines the methods that raise here, and sets ``linear``, an ``embedding`` of past actions if it embeds,
    shape and dtype: of one value, of floats any precision is read; and sizes: numbers of categories of its entries.
    """

    linear: nn.Linear
    embedding: Any
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    sizes: tuple[int, ...] = ()

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (b, t, n) -> parameters (b, t, p)."""
        return self.linear(hidden)

    def embed(self, values: Tensor) -> Tensor:
        """values (b, t, *shape) -> (b, t, n)."""
        return self.embedding(values)

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        """Joint log-probability, or log-density, of each step's value: (b, t, p), (b, t, *shape) -> (b, t)."""
        raise NotImplementedError

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy in nats, of numbers the differential one, (..., p) -> (...)."""
        raise NotImplementedError

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """One value per step, (b, t, *shape). temperature: divides logits, and multiplies standard deviations; 0 takes
        the likeliest."""
        raise NotImplementedError

    def check(self, values: Tensor, steps: tuple[int, int]) -> None:
        """UserError unless ``values`` are actions of shape (*steps, *shape), with ``steps`` (b, t); waits for the
        device."""
        check_values("actions", values, (*steps, *self.shape), self.dtype, self.sizes)


class MultiCategoricalReadout(Readout):
    """Several choices at once, each a softmax. num_discrete: values of each of the k choices, whose logits lie one
    after the other. UserError for numbers below 1."""

    dtype = torch.int64
    num_discrete: Any
    offsets: Tensor

    @checked_kinds
    def __init__(self, dim: int, num_discrete: Sequence[Rows], *, embeds: bool = False) -> None:
        super().__init__()
        require(len(num_discrete) > 0, "num_discrete", num_discrete, "at least one choice")
        self.num_discrete = self.sizes = tuple(num_discrete)
        self.shape = (len(num_discrete),)
        self.linear = nn.Linear(dim, sum(num_discrete))
        self.register_buffer("offsets", block_starts(num_discrete), persistent=False)
        if embeds:
            self.embedding = nn.Embedding(sum(num_discrete), dim)
            nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def embed(self, values: Tensor) -> Tensor:
        return self.embedding(values + self.offsets).sum(-2)

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        normalized = [block.log_softmax(-1) for block in params.split(self.sizes, -1)]
        return torch.cat(normalized, -1).gather(-1, values + self.offsets).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        return torch.stack([_categorical_entropy(block) for block in params.split(self.sizes, -1)]).sum(0)

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        blocks = _perturbed(params, generator, temperature).split(self.sizes, -1)
        return torch.stack([block.argmax(-1) for block in blocks], -1)


class CategoricalReadout(MultiCategoricalReadout):
    """One choice of ``num_discrete``; a value has no axis for it."""

    @checked_kinds
    def __init__(self, dim: int, num_discrete: Annotated[int, Whole(2, MOST_ROWS)], *, embeds: bool = False) -> None:
        super().__init__(dim, (num_discrete,), embeds=embeds)
        self.num_discrete, self.shape = num_discrete, ()

    def embed(self, values: Tensor) -> Tensor:
        return self.embedding(values)

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        return -F.cross_entropy(params.flatten(0, -2), values.flatten(), reduction="none").view(values.shape)

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        return _perturbed(params, generator, temperature).argmax(-1)


def _perturbed(logits: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
    """Logits whose largest entry is a sample (the Gumbel-max trick, which does not synchronize), float32."""
    return logits.float() + temperature * gumbel_noise(logits, generator)


def gumbel_noise(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape of logits, float32."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
    return -torch.log((-torch.log(uniform.clamp_min(1e-20))).clamp_min(1e-20))


def _categorical_entropy(logits: Tensor) -> Tensor:
    log_prob = logits.log_softmax(-1)
    return -(log_prob.exp() * log_prob).sum(-1)


class GaussianReadout(Readout):
    """Diagonal Gaussian over ``num_continuous`` values; parameters are (mean, log standard deviation) side by side.

    The log standard deviation is clamped to `MIN_LOG_STD`..`MAX_LOG_STD` (our choice; the paper has no limits). Without
    a limit, the likelihood of values that the model predicts exactly grows without bound. With it, the loss of a value
    is at least MIN_LOG_STD + log(2 pi) / 2.
    mean, std (a,): of the data; then the limits, and the embedding, are those of standardized values. Parameters,
    values and samples are in the data's units in any case. min_std: a higher lower limit of the deviation.
    """

    mean: Tensor | None
    std: Tensor | None

    @checked_kinds
    def __init__(
        self,
        dim: int,
        num_continuous: Rows,
        *,
        embeds: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        min_std: MinStd | None = None,
    ) -> None:
        super().__init__()
        self.num_continuous, self.shape = num_continuous, (num_continuous,)
        self.min_log_std = MIN_LOG_STD if min_std is None else math.log(min_std)
        register_statistics(self, num_continuous, mean, std)
        self.linear = nn.Linear(dim, 2 * num_continuous)
        if embeds:
            self.embedding = nn.Linear(num_continuous, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._limited(self.linear(hidden))

    def _limited(self, params: Tensor) -> Tensor:
        """What the linear map says (..., 2 a), as parameters of Gaussians in the data's units."""
        mean, log_std = params.chunk(2, -1)
        log_std = clamp_with_inward_gradient(log_std, self.min_log_std, MAX_LOG_STD)
        if self.mean is not None and self.std is not None:
            mean, log_std = self.mean + self.std * mean, log_std + self.std.log()
        return torch.cat([mean, log_std], -1)

    def embed(self, values: Tensor) -> Tensor:
        values = values.to(self.embedding.weight.dtype)
        if self.mean is not None and self.std is not None:
            values = (values - self.mean) / self.std
        return self.embedding(values)

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        return gaussian_log_prob(params, values).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        log_std = params.chunk(2, -1)[1]
        return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        params = params.to(torch.promote_types(params.dtype, torch.float32))
        mean = params.chunk(2, -1)[0]
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return sample_gaussian(params, noise=noise if temperature == 1 else temperature * noise)


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

    @checked_kinds
    def __init__(
        self, dim: int, num_continuous: int, *, modes: Annotated[int, Whole(2, MOST_MODES)], **options: Any
    ) -> None:
        super().__init__(dim, num_continuous, **options)
        self.modes = modes
        self.linear = nn.Linear(dim, modes * (1 + 2 * num_continuous))

    def forward(self, hidden: Tensor) -> Tensor:
        weights, gaussians = self.parts(self.linear(hidden))
        if self.choice_weight != 1:
            weights = weights + (self.choice_weight - 1) * (weights - weights.detach())
        return torch.cat([weights.log_softmax(-1), self._limited(gaussians).flatten(-2)], -1)

    def parts(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights (..., k), and the parameters of the Gaussians (..., k, 2 a)."""
        weights, gaussians = params.split([self.modes, self.modes * 2 * self.num_continuous], -1)
        return weights, gaussians.unflatten(-1, (self.modes, -1))

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        weights, gaussians = self.parts(params)
        return torch.logsumexp(weights + gaussian_log_prob(gaussians, values[..., None, :]).sum(-1), -1)

    def entropy(self, params: Tensor) -> Tensor:
        """Of mode and value together: that of the values is no higher, and as high where the modes lie apart. It has no
        closed form."""
        weights, gaussians = self.parts(params)
        return _categorical_entropy(weights) + (weights.exp() * super().entropy(gaussians)).sum(-1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        weights, gaussians = self.parts(params)
        mode = _perturbed(weights, generator, temperature).argmax(-1)[..., None, None]
        chosen = gaussians.gather(-2, mode.expand(*mode.shape[:-1], gaussians.shape[-1])).squeeze(-2)
        return super().sample(chosen, generator, temperature=temperature)


class MixedReadout(Readout):
    """A softmax for each of several categories and a Gaussian of numbers, independent of each other.

    A value is one vector, as of `MixedEncoder`: categories, then numbers. Parameters are the logits of all categories,
    then means and log standard deviations.
    """

    def __init__(self, dim: int, sizes: Sequence[int], num_continuous: int) -> None:
        super().__init__()
        self.categories = MultiCategoricalReadout(dim, sizes)
        self.numbers = GaussianReadout(dim, num_continuous)
        self.shape, self.sizes = (len(sizes) + num_continuous,), tuple(sizes)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.categories(hidden), self.numbers(hidden)], -1)

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor]:
        logits = sum(self.sizes)
        return params[..., :logits], params[..., logits:]

    def log_prob(self, params: Tensor, values: Tensor) -> Tensor:
        (logits, gaussian), entries = self._parts(params), len(self.sizes)
        chosen = self.categories.log_prob(logits, values[..., :entries].long())
        return chosen + self.numbers.log_prob(gaussian, values[..., entries:])

    def entropy(self, params: Tensor) -> Tensor:
        logits, gaussian = self._parts(params)
        return self.categories.entropy(logits) + self.numbers.entropy(gaussian)

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        logits, gaussian = self._parts(params)
        chosen = self.categories.sample(logits, generator, temperature=temperature).to(params.dtype)
        return torch.cat([chosen, self.numbers.sample(gaussian, generator, temperature=temperature)], -1)


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
        raise UserError(f"choice_weight is {weight}, but actions are no mixture; set it to 1, or action_modes above 1.")
    before, readout.choice_weight = readout.choice_weight, weight
    try:
        yield
    finally:
        readout.choice_weight = before


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


def make_readout(dim: int, name: str, options: dict[str, Any], *, embeds: bool = False) -> Readout:
    """The readout for ``dict(num_discrete = ...)``, a number or a list of them for several choices at once, or
    ``dict(num_continuous = ...)``, with ``mean`` and ``std`` if need be, ``min_std``, and ``modes`` for a mixture.
    name: of the argument, for errors. embeds: whether it also embeds past actions. UserError for other options."""
    names = set(options) if isinstance(options, dict) else set()
    if names == {"num_discrete"}:
        number = options["num_discrete"]
        if isinstance(number, Iterable) and not isinstance(number, str):
            return MultiCategoricalReadout(dim, list(number), embeds=embeds)
        return CategoricalReadout(dim, options["num_discrete"], embeds=embeds)
    if names - {"modes", "min_std", "mean", "std"} == {"num_continuous"}:
        kind = GaussianMixtureReadout if "modes" in names else GaussianReadout
        return kind(dim, **options, embeds=embeds)
    raise UserError(f"{name} is {options!r}; expected dict(num_discrete = ...) or dict(num_continuous = ...).")
