"""Prediction of residuals: the next ones, that at the next switch, the last one; and what keeps them from collapsing.

Axes: b batch, t steps, n width, k steps ahead, m directions, s points of integration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.data.trajectories import masked_mean
from metacontroller.models.readouts import GaussianReadout
from metacontroller.ranges import Count, Whole, check

SPAN, POINTS = 5.0, 17
"""SIGReg integrates over -SPAN..SPAN at so many points (arXiv 2511.08544, section 4)."""


class LatentPrediction(nn.Module):
    """A Gaussian of the next k residuals, read from the residual now: p(e_{t+1}, .., e_{t+k} | e_t).

    dim: n. ahead: k. UserError for ``ahead`` below 1.
    """

    def __init__(self, dim: int, *, ahead: int = 1) -> None:
        super().__init__()
        check("ahead", ahead, Count)
        self.ahead = ahead
        self.readout = GaussianReadout(dim, dim * ahead)

    def loss(self, residual: Tensor, mask: Tensor) -> Tensor:
        """-log p an entry, a mean over steps whose next k steps are real; 0 where there are none. The residuals that
        are predicted get no gradient.

        residual (b, t, n), mask (b, t) bool: real steps, before padding -> scalar.
        """
        if residual.shape[1] <= self.ahead:
            return residual.new_zeros(())
        following = residual[:, 1:].detach().unfold(1, self.ahead, 1)  # (b, t - k, n, k)
        inside = mask[:, self.ahead :]
        log_prob = self.readout.log_prob(self.readout(residual[:, : -self.ahead]), following.flatten(2))
        return -masked_mean(log_prob, inside) / following[0, 0].numel()

    def entropy(self, residual: Tensor, weights: Sequence[float] | None = None) -> Tensor:
        """Differential entropy in nats of the predictions, without a gradient: residual (b, t, n) -> (b, t).

        weights (k,): of the residuals ahead; 1, 1/2, 1/4, .. if not given.
        """
        chosen = [0.5**step for step in range(self.ahead)] if weights is None else list(weights)
        with torch.no_grad():
            log_std = self.readout(residual).chunk(2, -1)[1].unflatten(-1, (-1, self.ahead))  # (b, t, n, k)
            each = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-2)
            return each @ each.new_tensor(chosen)


class NextSwitch(nn.Module):
    """Predicts the residual at the next switch from what the emitter knows at this one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def loss(self, emitted: Tensor, residual: Tensor, switched: Tensor) -> Tensor:
        """Mean absolute error over pairs of successive switches of an episode, 0 without any; a scalar.

        emitted, residual (b, t, n_e), of which the residual gets no gradient; switched (b, t) bool.
        """
        rows, steps = switched.nonzero(as_tuple=True)  # of one row after another, in time
        same = rows[1:] == rows[:-1]
        now, following = (rows[:-1][same], steps[:-1][same]), (rows[1:][same], steps[1:][same])
        predicted = self.linear(emitted[now])
        if not len(predicted):
            return predicted.sum()
        return F.l1_loss(predicted, residual[following].detach())


def sigreg(
    vectors: Tensor, directions: Tensor, domain: Sequence[float] = (-SPAN, SPAN), points: int = POINTS
) -> Tensor:
    """Sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544): how far vectors are from N(0, I).

    vectors (b, n), directions (m, n) of any length above 0 -> scalar. Along each unit direction, the characteristic
    function of the projections is compared with that of N(0, 1):

        integral over -5..5 of |mean exp(i s x) - exp(-s^2 / 2)|^2 exp(-s^2 / 2) ds

    by the trapezoidal rule; a mean over directions. It is the statistic of Epps and Pulley without its factor b.
    domain, points: of the integral, if not -5..5 and 17. UserError for fewer than 2 points.
    """
    check("points", points, Whole(2))
    at = torch.linspace(domain[0], domain[1], points, device=vectors.device, dtype=vectors.dtype)
    projected = vectors @ F.normalize(directions, dim=-1).T  # (b, m)
    angles = projected[..., None] * at
    normal = torch.exp(-0.5 * at.square())
    distance = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()  # (m, s)
    return torch.trapezoid(distance * normal, at).mean()


class NextLatent(nn.Module):
    """A model's next last residual, u_{t+1} = u_t + f(u_t, embedding of a_t) with f a residual MLP whose last layer
    starts at 0 (next-latent prediction, arXiv 2511.05963, section 3).

    dim: n. dim_action: width of the embeddings, n if not given. hidden: width of the MLP. layers: of it, at least 1.
    """

    def __init__(self, dim: int, *, dim_action: int | None = None, hidden: int | None = None, layers: int = 3) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        inputs = dim + (dim if dim_action is None else dim_action)
        self.norm = nn.LayerNorm(inputs)
        widths = [inputs, *[hidden] * (layers - 1)]
        self.hidden = nn.ModuleList(nn.Linear(width, hidden) for width in widths)
        self.last = nn.Linear(hidden, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        """latent (b, t, n), embedding of the action (b, t, its width) -> the next latent (b, t, n)."""
        x = self.norm(torch.cat([latent, action], -1))
        for layer in self.hidden:
            x = F.silu(layer(x))
        return latent + self.last(x)

    def loss(self, latents: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        """Smooth L1 distance to the next latent, which gets no gradient, a mean over real steps; a scalar.

        latents (b, t, n). actions (b, t - 1 or more, n): embeddings. mask (b, t) bool: real steps; a pair counts if its
        second step is real. 0 for a single step.
        """
        if latents.shape[1] < 2:
            return latents.new_zeros(())
        predicted = self(latents[:, :-1], actions[:, : latents.shape[1] - 1])
        distance = F.smooth_l1_loss(predicted, latents[:, 1:].detach(), reduction="none").mean(-1)
        return masked_mean(distance, mask[:, 1:])
