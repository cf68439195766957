"""Long actions as linear maps with fixed points: codes named without labels, to start discovery from (our choice).

'Go to blue' ends at blue. In an observation that tells where things are seen from here, that end is a linear function
of any moment on the way, and another one for each color: ``x_end = A_k x + b_k``. Two steps, neither of which sees a
label:

1. Demonstrations end where their last long action ends. A mixture of K linear maps is fitted by expectation
   maximization to pairs (a moment shortly before the end, the end).
2. A long action is over where its map changes nothing, ``r_k = A_k x + b_k - x`` near 0: as likely as at ends, measured
   against all moments. Each step gets the code of the next such arrival.

That rests on two things, which a world may lack: ends are linear in positions, and experts do not pass by the ends of
long actions that they do not carry out.

Axes: v views of the same episodes, such as a world turned in several ways; b episodes; t steps; n numbers of a
position; p pairs; k maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.errors import UserError

STRIDE, BEFORE = 3, 16
"""Pairs: every third step of the last 48 before an end."""
ROUNDS, SHARED_ROUNDS = 80, 60
"""Of expectation maximization, and how many of them have one variance for all maps."""
FLOOR = 0.003
"""Added to each variance; positions have variance 1."""
LIKELIER = 4.0
"""Nats by which an arrival is more likely an end than any moment is: the price of one of about 50 steps."""


@dataclass(frozen=True)
class _Gaussians:
    """One normal distribution for each map: mean (k, n), whitening (k, n, n), log_det (k,) of the covariance."""

    mean: Tensor
    whitening: Tensor
    log_det: Tensor

    @staticmethod
    def of(mean: Tensor, covariance: Tensor) -> _Gaussians:
        values, vectors = torch.linalg.eigh(covariance + FLOOR * torch.eye(mean.shape[-1], dtype=mean.dtype))
        return _Gaussians(mean, vectors / values.sqrt()[:, None], values.log().sum(-1))

    def log_prob(self, x: Tensor) -> Tensor:
        """x (..., k, n) -> (..., k), without the constant."""
        white = torch.einsum("...kn,knm->...km", x - self.mean, self.whitening)
        return -0.5 * (white.square().sum(-1) + self.log_det)


class FixedPoints:
    """K linear maps of positions, and how their fixed points look.

    maps (k, n + 1, n): A_k and b_k of standardized positions. at_ends, at_all: distributions of the residuals r_k.
    """

    def __init__(self, mean: Tensor, std: Tensor, maps: Tensor, at_ends: _Gaussians, at_all: _Gaussians) -> None:
        self.mean, self.std, self.maps, self.at_ends, self.at_all = mean, std, maps, at_ends, at_all

    @classmethod
    def fit(cls, views: Tensor, lengths: Tensor, codes: int, generator: torch.Generator) -> FixedPoints:
        """Fits ``codes`` maps to positions (v, b, t + 1, n) of episodes with ``lengths`` (b,) actions.

        UserError if no episode is long enough, or too few are.
        """
        views = views.double()
        count, entries = lengths.shape[0], views.shape[2]
        real = torch.arange(entries) <= lengths[:, None]
        mean, std = views[:, real].mean((0, 1)), views[:, real].std((0, 1)) + 1e-6
        views = (views - mean) / std
        before = lengths[:, None] - STRIDE * torch.arange(1, BEFORE + 1)
        episode, column = (before >= 0).nonzero(as_tuple=True)
        pairs, size = len(episode), views.shape[-1]
        if pairs < 10 * codes * (size + 1):
            raise UserError(
                f"{count} demonstrations give {pairs} pairs to fit {codes} linear maps of {size} numbers to; expected "
                f"at least {10 * codes * (size + 1)}: make demonstrations longer, or set discover.guided_updates to 0."
            )
        x = F.pad(views[:, episode, before[episode, column]], (0, 1), value=1.0)  # (v, p, n + 1)
        end = views[:, episode, lengths[episode]]
        share = torch.rand(count, codes, generator=generator, dtype=torch.double) ** 4
        share = share / share.sum(1, keepdim=True)
        pairs_of = torch.bincount(episode, minlength=count).clamp_min(1)[:, None]
        for turn in range(ROUNDS):
            weight = share[episode].T  # (k, p)
            gram = torch.einsum("vpi,kp,vpj->kij", x, weight, x) + 1e-2 * torch.eye(size + 1, dtype=torch.double)
            maps = torch.linalg.solve(gram, torch.einsum("vpi,kp,vpn->kin", x, weight, end))
            error = torch.einsum("vpi,kin->vpkn", x, maps) - end[:, :, None]
            covariance = torch.einsum("vpkn,kp,vpkm->knm", error, weight, error)
            covariance = covariance / (len(views) * weight.sum(1))[:, None, None].clamp_min(1e-9)
            if turn < SHARED_ROUNDS:
                variance = (covariance.diagonal(dim1=1, dim2=2).mean(1) * share.mean(0)).sum()
                covariance = (variance * torch.eye(size, dtype=torch.double)).expand(codes, -1, -1)
            likely = _Gaussians.of(maps.new_zeros(codes, size), covariance)
            each = maps.new_zeros(count, codes).index_add_(0, episode, likely.log_prob(error).mean(0)) / pairs_of
            # an episode's pairs tell one end: together they count twice; less at first, so that all maps take part
            sharpness = 2 * min(1.0, 0.1 + turn / 40)
            share = torch.softmax(sharpness * each + share.mean(0).clamp_min(1e-9).log(), 1)
        residuals = _residuals(views[0][real], maps)
        centered = residuals - residuals.mean(0)
        spread = torch.einsum("pkn,pkm->knm", centered, centered) / len(centered)
        return cls(mean, std, maps, likely, _Gaussians.of(residuals.mean(0), spread))

    def evidence(self, positions: Tensor) -> Tensor:
        """Nats by which each map is more likely at its fixed point here than anywhere: (..., n) -> (..., k)."""
        residuals = _residuals((positions.double() - self.mean) / self.std, self.maps)
        return self.at_ends.log_prob(residuals) - self.at_all.log_prob(residuals)

    def codes(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """The code in force at each step, (b, t) int64: that of the next arrival, the episode's end at the latest.

        positions (b, t + 1, n) of episodes with ``lengths`` (b,) actions. Beyond its length an episode repeats its last
        code.
        """
        evidence = self.evidence(positions)
        at = evidence > LIKELIER
        arrival = at[:, 1:] & ~at[:, :-1]  # the first moment: one stays at an end for a while
        entry = torch.arange(1, positions.shape[1], device=lengths.device)
        last = entry == lengths[:, None]
        arrives = (arrival.any(-1) & (entry < lengths[:, None])) | last
        which = torch.where(arrival, evidence[:, 1:], evidence[:, 1:] - 1e9).argmax(-1)  # of those that arrive
        index = torch.where(arrives, entry - 1, positions.shape[1])
        following = index.flip(1).cummin(1).values.flip(1).minimum(lengths[:, None] - 1)
        return which.gather(1, following)


def _residuals(x: Tensor, maps: Tensor) -> Tensor:
    """r_k (..., k, n) of standardized positions x (..., n), for maps (k, n + 1, n)."""
    return torch.einsum("...i,kin->...kn", F.pad(x, (0, 1), value=1.0), maps) - x[..., None, :]
