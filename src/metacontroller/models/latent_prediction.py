"""Prediction of the next residuals, and what keeps residuals from collapsing meanwhile.

Axes: b batch, t steps, n width, k steps ahead, m directions, s points of integration.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.data.trajectories import masked_mean
from metacontroller.errors import UserError
from metacontroller.models.readouts import GaussianReadout

SPAN, POINTS = 5.0, 17
"""SIGReg integrates over -SPAN..SPAN at so many points (arXiv 2511.08544, section 4)."""


class LatentPrediction(nn.Module):
    """A Gaussian of the next k residuals, read from the residual now: p(e_{t+1}, .., e_{t+k} | e_t).

    dim: n. ahead: k. UserError for ``ahead`` below 1.
    """

    def __init__(self, dim: int, *, ahead: int = 1) -> None:
        super().__init__()
        if ahead < 1:
            raise UserError(f"ahead is {ahead}; expected at least 1 step.")
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


def sigreg(vectors: Tensor, directions: Tensor) -> Tensor:
    """Sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544): how far vectors are from N(0, I).

    vectors (b, n), directions (m, n) of any length above 0 -> scalar. Along each unit direction, the characteristic
    function of the projections is compared with that of N(0, 1):

        integral over -5..5 of |mean exp(i s x) - exp(-s^2 / 2)|^2 exp(-s^2 / 2) ds

    by the trapezoidal rule; a mean over directions. It is the statistic of Epps and Pulley without its factor b.
    """
    points = torch.linspace(-SPAN, SPAN, POINTS, device=vectors.device, dtype=vectors.dtype)
    projected = vectors @ F.normalize(directions, dim=-1).T  # (b, m)
    angles = projected[..., None] * points
    normal = torch.exp(-0.5 * points.square())
    distance = (angles.cos().mean(0) - normal).square() + angles.sin().mean(0).square()  # (m, s)
    return torch.trapezoid(distance * normal, points).mean()
