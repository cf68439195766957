"""CompILE's recognition model: where segments end, and a code for each (arXiv 1812.01483, section 3).

    q(b_i | x): a categorical over the boundary between segments i and i + 1, that is the first step of segment i + 1,
                relaxed by Gumbel-softmax; the last segment ends with the episode
    q(z_i | x): a Gaussian, read from the recurrent encoder just before b_i
    s_i(t) = prod_{j<i} P(b_j <= t) (1 - P(b_i <= t))       how much step t belongs to segment i; sums to 1 over i

The encoder runs once for each segment and ignores the steps before it: its state is multiplied by
prod_{j<i} P(b_j <= t).
Axes: b batch, t steps, p positions of a boundary (0..t, the last is the end), i segments, z code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.control.losses import gaussian_kl
from metacontroller.data.trajectories import length_mask
from metacontroller.models.readouts import sample_gaussian
from metacontroller.ranges import Positive, Whole, check


class SegmentNoise(NamedTuple):
    """boundary (b, i - 1, p): uniform in (0, 1), for the Gumbel-softmax. code (b, i, z): standard normal."""

    boundary: Tensor
    code: Tensor


class Segmentation(NamedTuple):
    """Segments of a batch of episodes and their codes.

    code (b, i, z): one for each segment. share (b, i, t): s_i(t). boundaries (b, i - 1, p): relaxed one-hot of the
    first step of each segment but the first; position ``length`` means that there is no such segment. code_kl (b,): KL
    of all codes against N(0, I). boundary_kl (b,): KL of the boundaries against the prior on lengths.
    """

    code: Tensor
    share: Tensor
    boundaries: Tensor
    code_kl: Tensor
    boundary_kl: Tensor

    def code_at(self) -> Tensor:
        """The code in force at each step, (b, t, z): codes mixed by s_i(t)."""
        return torch.einsum("bit,biz->btz", self.share, self.code)

    def boundary_at(self) -> Tensor:
        """How much each step is the first of a new segment, (b, t); 0 at the first step of an episode."""
        return self.boundaries[..., :-1].sum(1).clamp(max=1.0)


class Segmenter(nn.Module):
    """Splits inputs into segments, with a Gaussian code for each.

    dim_in: width of the inputs. dim, depth: width and layers of the recurrent encoder (GRU). hidden: units of the two
    heads. segments: M, the maximum number of segments. temperature: of the Gumbel-softmax. prior_rate: mean length of a
    segment under the Poisson prior. UserError for values out of range.
    """

    def __init__(
        self,
        dim_in: int,
        *,
        dim_latent: int,
        segments: int,
        dim: int = 64,
        depth: int = 1,
        hidden: int = 32,
        temperature: float = 1.0,
        prior_rate: float = 10.0,
    ) -> None:
        super().__init__()
        check("segments", segments, Whole(2))
        check("temperature", temperature, Positive)
        check("prior_rate", prior_rate, Positive)
        self.segments, self.dim_latent = segments, dim_latent
        self.temperature, self.prior_rate = temperature, prior_rate
        self.project_in = nn.Linear(dim_in, dim)
        self.end = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.layers = nn.ModuleList(nn.GRUCell(dim, dim) for _ in range(depth))
        self.boundary = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.code = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 2 * dim_latent))

    def forward(self, inputs: Tensor, lengths: Tensor, noise: SegmentNoise | None = None) -> Segmentation:
        """inputs (b, t, dim_in), lengths (b,) -> `Segmentation`.

        Without noise: the most likely boundaries and the mean codes.
        """
        steps = inputs.shape[1]
        x = F.pad(self.project_in(inputs), (0, 0, 0, 1))
        positions = torch.arange(steps + 1, device=inputs.device)
        x = torch.where((positions == lengths[:, None])[..., None], self.end, x)
        known = length_mask(lengths + 1, steps + 1)
        allowed = known & (positions > 0)
        read_x = _project(self.layers[0], x)  # the same for every segment
        reached = x.new_ones(x.shape[:2])  # prod_{j<i} P(b_j <= p)
        boundaries, shares, distributions, logits = [], [], [], []
        for index in range(self.segments):
            encoded = self._encode(read_x, reached)
            if index + 1 < self.segments:
                logits.append(self.boundary(encoded)[..., 0].masked_fill(~allowed, -torch.inf))
                boundary = self._sample_boundary(logits[-1], None if noise is None else noise.boundary[:, index])
                boundaries.append(boundary)
            else:
                boundary = (positions == lengths[:, None]).to(x.dtype)
            over = boundary.cumsum(1).clamp(max=1.0)
            shares.append((reached * (1 - over))[:, :-1])
            reached = reached * over
            distributions.append(self.code((boundary[:, 1:, None] * encoded[:, :-1]).sum(1)))
        proposal = torch.stack(distributions, 1)
        mean, log_std = proposal.chunk(2, -1)
        code = mean if noise is None else sample_gaussian(proposal, noise=noise.code)
        kl, prior = gaussian_kl(mean, log_std).sum(1), poisson_log_prior(allowed, self.prior_rate, x.dtype)
        boundary_kl = self.segments * categorical_kl(F.log_softmax(logits[0], -1), prior)
        return Segmentation(code, torch.stack(shares, 1), torch.stack(boundaries, 1), kl, boundary_kl)

    def sample_noise(self, batch: int, steps: int, generator: torch.Generator | None = None) -> SegmentNoise:
        """Noise for ``forward`` on ``batch`` inputs of ``steps`` steps."""
        options = {"generator": generator, "device": self.end.device}
        boundary = torch.rand(batch, self.segments - 1, steps + 1, **options)
        return SegmentNoise(boundary, torch.randn(batch, self.segments, self.dim_latent, **options))

    def _encode(self, read_x: Tensor, mask: Tensor) -> Tensor:
        """The masked encoder: the first layer's input projections (b, p, 3 d), mask (b, p) -> (b, p, d)."""
        first, *rest = self.layers
        encoded = _masked_gru(first, read_x, mask)
        for cell in rest:
            encoded = _masked_gru(cell, _project(cell, encoded), mask)
        return encoded

    def _sample_boundary(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """A relaxed one-hot of the boundary's position (b, p); without noise the one-hot of the most likely."""
        if uniform is None:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6)))
        return F.softmax((logits + gumbel) / self.temperature, -1)


def _project(cell: Any, x: Tensor) -> Tensor:
    """The part of the cell's gates that depends on its inputs alone, (..., d) -> (..., 3 d)."""
    return F.linear(x, cell.weight_ih, cell.bias_ih)


def _masked_gru(cell: Any, read_x: Tensor, mask: Tensor) -> Tensor:
    """The cell over projected inputs (b, p, 3 d) -> (b, p, d); mask (b, p) multiplies its state after each step."""
    state, outputs = read_x.new_zeros(len(read_x), cell.hidden_size), []
    sizes = [2 * cell.hidden_size, cell.hidden_size]
    for x, factor in zip(read_x.unbind(1), mask.unbind(1), strict=True):
        gates_x, new_x = x.split(sizes, -1)
        gates_h, new_h = F.linear(state, cell.weight_hh, cell.bias_hh).split(sizes, -1)
        reset, update = torch.sigmoid(gates_x + gates_h).chunk(2, -1)
        state = factor[:, None] * torch.lerp(torch.tanh(new_x + reset * new_h), state, update)
        outputs.append(state)
    return torch.stack(outputs, 1)


def poisson_log_prior(allowed: Tensor, rate: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-probability (b, p) of each allowed position under Poisson(rate), normalized over them; -inf elsewhere.

    allowed (b, p) bool.
    """
    positions = torch.arange(allowed.shape[1], device=allowed.device, dtype=dtype)
    log_prob = positions * math.log(rate) - torch.lgamma(positions + 1)
    return F.log_softmax(log_prob.expand(len(allowed), -1).masked_fill(~allowed, -torch.inf), -1)


def categorical_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) of categoricals with the same support, log-probabilities (b, p) -> (b,)."""
    difference = (log_q - log_p).masked_fill(log_q == -torch.inf, 0.0)
    return (log_q.exp() * difference).sum(-1)
