"""Next-latent prediction: a small network predicts the model's next last residual (arXiv 2511.05963, section 3).

Axes: b batch, t steps, n width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.data.trajectories import masked_mean


class NextLatent(nn.Module):
    """u_{t+1} = u_t + f(u_t, embedding of a_t), a residual MLP whose last layer starts at 0.

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
