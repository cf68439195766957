"""Distributions of codes: Gaussian (paper D.2), or binary as in the Free Transformer (arXiv 2510.17558).

A distribution is one tensor of parameters (..., p); the proposal of discovery and the policy of internal RL give the
same. Axes: h bits, d = 2^h code words, n_z entries of a code.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.control.losses import gaussian_kl
from metacontroller.data.trajectories import masked_mean
from metacontroller.errors import UserError
from metacontroller.models.readouts import gaussian_log_prob, sample_gaussian

CodeKind = Literal["gaussian", "binary"]

MAX_BITS = 16
"""Bits of a binary code at most; a code is a one-hot vector of 2^bits entries."""


class GaussianCodes(nn.Module):
    """Codes z in R^n with the prior N(0, I). Parameters (..., 2 n): mean, then log standard deviation.

    dim: n_z. noise_dim: entries of the noise of one sample. params: p. entries: of a log-probability.
    """

    kind: CodeKind = "gaussian"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.noise_dim = self.entries = dim
        self.params = 2 * dim

    def sample(
        self,
        distribution: Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """One reparameterised sample each, (..., p) -> (..., n_z).

        noise (..., noise_dim): standard normal, sampled here if not given. temperature: multiplies the standard
        deviation.
        """
        if temperature != 1.0:
            mean, log_std = distribution.chunk(2, -1)
            distribution = torch.cat([mean, log_std + math.log(max(temperature, 1e-12))], -1)
        if noise is None:
            return sample_gaussian(distribution, generator)
        return sample_gaussian(distribution, noise=noise)

    def log_prob(self, distribution: Tensor, code: Tensor) -> Tensor:
        """Log-density of each entry: (..., p), (..., n_z) -> (..., entries); their sum is that of the code."""
        return gaussian_log_prob(distribution, code)

    def kl(self, distribution: Tensor) -> Tensor:
        """KL to the prior in nats, summed over the code (eq. 3): (..., p) -> (...)."""
        return gaussian_kl(*distribution.chunk(2, -1))

    def kl_entries(self, distribution: Tensor) -> Tensor:
        """KL to the prior of each entry: (..., p) -> (..., entries)."""
        mean, log_std = distribution.chunk(2, -1)
        return gaussian_kl(mean[..., None], log_std[..., None])

    def mean_entropy(self, distribution: Tensor, mask: Tensor) -> Tensor:
        """Differential entropy of a code in nats, mean over the steps of mask (b, t): (b, t, p) -> scalar."""
        log_std = distribution.chunk(2, -1)[1].sum(-1)
        return masked_mean(log_std, mask) + 0.5 * self.dim * math.log(2 * math.pi * math.e)

    def prior(self, like: Tensor, *shape: int) -> Tensor:
        """Parameters of the prior, (*shape, p), of the type and on the device of ``like``."""
        return like.new_zeros(*shape, self.params)

    def start(self, std: float = 1.0) -> Tensor:
        """(p,) parameters from which a policy starts: N(0, std^2 I). UserError unless std is positive."""
        if not 0 < std < math.inf:
            raise UserError(f"policy_std is {std}; expected a number above 0.")
        return torch.tensor([0.0, math.log(std)]).repeat_interleave(self.dim)


class BinaryCodes(nn.Module):
    """Codes of h independent bits, given to the controller as one-hot vectors of 2^h entries, with a uniform prior.

    Parameters (..., h): logits of the bits. Word d has bit i set where d has it in base 2. A sample y is one-hot. Its
    gradient is that of the probability of every word (arXiv 2510.17558, section 3.3):

        y + G - stop(G),   G_d = prod_i sigma(l_i)^(d_i) sigma(-l_i)^(1 - d_i)

    The KL to the prior is h log 2 minus the entropy of the bits. Of it, ``free_bits`` bits a step cost nothing, so that
    a code is not driven to say nothing at all (section 3.4): max(0, KL - free_bits log 2). UserError unless
    1 <= bits <= 16 and free_bits >= 0.
    """

    kind: CodeKind = "binary"
    words: Tensor

    def __init__(self, bits: int, *, free_bits: float = 0.0) -> None:
        super().__init__()
        if not 1 <= bits <= MAX_BITS:
            raise UserError(f"a binary code has {bits} bits; expected 1..{MAX_BITS}.")
        if not free_bits >= 0:
            raise UserError(f"free_bits is {free_bits}; expected at least 0.")
        self.params = self.noise_dim = self.entries = bits
        self.dim, self.free_bits = 2**bits, free_bits
        words = torch.arange(self.dim)[:, None] >> torch.arange(bits) & 1
        self.register_buffer("words", words, persistent=False)

    def sample(
        self,
        distribution: Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """One straight-through sample each, (..., h) -> one-hot (..., 2^h).

        noise (..., h): standard normal, sampled here if not given; a bit is 1 where its noise lies in the upper tail of
        the bit's probability. temperature: divides the logits.
        """
        if noise is None:
            shape, device = distribution.shape, distribution.device
            noise = torch.randn(shape, generator=generator, device=device, dtype=distribution.dtype)
        tail = 0.5 * torch.erfc(noise / math.sqrt(2))  # uniform in (0, 1)
        bits = tail < torch.sigmoid(distribution / temperature)
        word = (bits.long() << torch.arange(self.entries, device=bits.device)).sum(-1)
        chosen = F.one_hot(word, self.dim).to(distribution.dtype)
        if not (torch.is_grad_enabled() and distribution.requires_grad):
            return chosen
        probability = self.log_probabilities(distribution).exp()
        return chosen + probability - probability.detach()

    def log_probabilities(self, distribution: Tensor) -> Tensor:
        """Log-probability of every word: (..., h) -> (..., 2^h)."""
        words = self.words.to(distribution.dtype)
        return F.logsigmoid(distribution) @ words.T + F.logsigmoid(-distribution) @ (1 - words).T

    def log_prob(self, distribution: Tensor, code: Tensor) -> Tensor:
        """Log-probability of each bit of a word: (..., h), one-hot (..., 2^h) -> (..., h)."""
        bits = self.words[code.argmax(-1)].to(distribution.dtype)
        return F.logsigmoid(distribution * (2 * bits - 1))

    def kl(self, distribution: Tensor) -> Tensor:
        """KL to the uniform prior in nats beyond the free bits, (..., h) -> (...)."""
        return (self.kl_entries(distribution).sum(-1) - self.free_bits * math.log(2)).clamp_min(0)

    def kl_entries(self, distribution: Tensor) -> Tensor:
        """KL to the uniform prior of each bit, without free bits: (..., h) -> (..., h)."""
        return math.log(2) - _bit_entropy(distribution)

    def mean_entropy(self, distribution: Tensor, mask: Tensor) -> Tensor:
        """Entropy of a code in nats, mean over the steps of mask (b, t): (b, t, h) -> scalar."""
        return masked_mean(_bit_entropy(distribution).sum(-1), mask)

    def prior(self, like: Tensor, *shape: int) -> Tensor:
        """Parameters of the prior, (*shape, h) zeros, of the type and on the device of ``like``."""
        return like.new_zeros(*shape, self.params)

    def start(self, std: float = 1.0) -> Tensor:
        """(h,) parameters from which a policy starts: the prior. UserError for another std than 1."""
        if std != 1.0:
            raise UserError(f"policy_std is {std}; expected 1: binary codes start from their uniform prior.")
        return torch.zeros(self.params)


def bounded(code: Tensor, scale: float | None) -> Tensor:
    """scale tanh(code / scale), elementwise: keeps codes where training has seen them; the code itself for None.

    A barrier as in latent-space RL (LATENT, zzk273.github.io/LATENT). UserError unless the scale is positive.
    """
    if scale is None:
        return code
    if scale <= 0:
        raise UserError(f"the bound of codes is {scale}; expected a number above 0.")
    return scale * torch.tanh(code / scale)


def _bit_entropy(logits: Tensor) -> Tensor:
    """Entropy of each bit in nats, elementwise."""
    probability = torch.sigmoid(logits)
    return -(probability * F.logsigmoid(logits) + (1 - probability) * F.logsigmoid(-logits))


Codes = GaussianCodes | BinaryCodes


def make_codes(kind: CodeKind, dim_latent: int, free_bits: float = 0.0) -> Codes:
    """Gaussian codes of ``dim_latent`` entries, or binary codes of ``dim_latent`` bits; UserError for another kind."""
    if kind == "binary":
        return BinaryCodes(dim_latent, free_bits=free_bits)
    if kind != "gaussian":
        raise UserError(f"code is {kind!r}; expected 'gaussian' or 'binary'.")
    if free_bits:
        raise UserError(f"free_bits is {free_bits}; expected 0: Gaussian codes have none.")
    return GaussianCodes(dim_latent)
