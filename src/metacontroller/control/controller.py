"""Controller decoder: from a code z to a linear map U of the residual stream (eq. 11, 18), applied without forming U.

Axes: i residual in, o residual out (both of size n_e), k hidden units plus one constant, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.ranges import MOST_WIDTH, Depth, Whole, check

ROWS_AT_ONCE = 4096
"""Steps that a full U is applied to at a time where no gradient is kept: bounds memory."""


class Controller(nn.Module):
    """U = f_hyp(z), a hypernetwork with hidden units h; U = A(h) B(h)^T or full U(h), each linear in (h, 1).

    dim_latent: n_z. dim_model: n_e. hidden: units of a hidden layer; 0 takes the code itself for h, so that each of
    2^bits words of a binary code has a matrix of its own (our choice). depth: hidden layers (the paper: 1). rank: r, or
    None for a full matrix (the paper's ant). At initialisation A (or the full U) is small, so that steering starts near
    the identity. UserError for values out of range.
    """

    def __init__(
        self, dim_latent: int, dim_model: int, *, hidden: int = 32, rank: int | None = 16, depth: int = 1
    ) -> None:
        super().__init__()
        check("hidden of the controller", hidden, Whole(0, MOST_WIDTH))
        check("rank", rank, int | None)
        if dim_latent < 1 or dim_model < 1:
            raise UserError(f"dim_latent is {dim_latent}, dim_model {dim_model}; expected at least 1 each.")
        if not hidden and depth > 1:
            raise UserError(f"depth is {depth}, but hidden is 0; expected depth 1, or hidden units.")
        if rank is not None and not 1 <= rank <= dim_model:
            raise UserError(f"rank is {rank}; expected None (full) or 1..{dim_model}, the residual's width.")
        check("depth of the controller", depth, Depth)
        self.dim_model, self.rank = dim_model, rank
        self.code_to_hidden: Any = nn.Linear(dim_latent, hidden) if hidden else None
        self.deeper = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1)) if depth > 1 else None
        units, scale = (hidden or dim_latent) + 1, 0.1 * dim_model**-0.5
        if rank is None:
            self.full = nn.Parameter(torch.randn(units, dim_model, dim_model) * scale)  # (k, o, i)
        else:
            self.read = nn.Parameter(torch.randn(units, rank, dim_model) * dim_model**-0.5)  # B: (k, r, i)
            self.write = nn.Parameter(torch.randn(dim_model, units, rank) * scale)  # A: (o, k, r)

    def hidden(self, z: Tensor) -> Tensor:
        """z (..., n_z) -> (..., k): the hidden units and the constant 1."""
        if self.code_to_hidden is None:
            return F.pad(z, (0, 1), value=1.0)
        hidden = F.relu(self.code_to_hidden(z))
        for layer in self.deeper or ():
            hidden = F.relu(layer(hidden))
        return F.pad(hidden, (0, 1), value=1.0)

    def matrix(self, z: Tensor) -> Tensor:
        """z (..., n_z) -> U (..., residual_out, residual_in), n_e² entries per code: for inspection and tests."""
        hidden = self.hidden(z)
        if self.rank is None:
            return torch.einsum("...k,koi->...oi", hidden, self.full)
        read = torch.einsum("...k,kri->...ri", hidden, self.read)
        write = torch.einsum("...k,okr->...or", hidden, self.write)
        return write @ read

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        """z (..., n_z), e (..., n_e) -> U e (..., n_e); U is never formed.

        Costs two matrix products of width k r for low rank, one of width k n_e for full.
        """
        hidden = self.hidden(z)
        if self.rank is None:
            few = e.numel() <= ROWS_AT_ONCE * self.dim_model
            if few or torch.is_grad_enabled() or hidden.shape[:-1] != e.shape[:-1]:
                return self._full(hidden, e)
            rows = zip(hidden.flatten(0, -2).split(ROWS_AT_ONCE), e.flatten(0, -2).split(ROWS_AT_ONCE), strict=True)
            return torch.cat([self._full(*pair) for pair in rows]).view(e.shape)
        projected = F.linear(e, self.read.flatten(0, 1)).unflatten(-1, self.read.shape[:2])  # (..., k, r)
        v = torch.einsum("...k,...kr->...r", hidden, projected)
        weighted = (hidden[..., None] * v[..., None, :]).flatten(-2)  # (..., k r)
        return F.linear(weighted, self.write.flatten(1))

    def _full(self, hidden: Tensor, e: Tensor) -> Tensor:
        """hidden (..., k), e (..., n_e) -> U e of a full U; holds k n_e numbers a row."""
        products = F.linear(e, self.full.flatten(0, 1)).unflatten(-1, self.full.shape[:2])
        return torch.einsum("...k,...ko->...o", hidden, products)
