"""Hawk: pre-norm blocks around a real-gated linear recurrent unit (RG-LRU), arXiv 2402.19427; the paper's SSM (D.1).

A block is x + recurrence(norm(x)), then x + mlp(norm(x)). The recurrence is the product of two branches of the
recurrent width, a causal convolution over four steps with the RG-LRU and a GeLU, and a linear map back to the residual.
The MLP has a ReLU, as in the paper. Cost and memory are linear in time; acting carries a state of constant size.

Axes: b batch, t steps, n model width, w recurrent width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.kernels.linear_scan import linear_scan
from metacontroller.models.blocks import Block, Body, Norm, variance_scaling_
from metacontroller.models.caches import HawkCache, HawkStore
from metacontroller.ranges import DepthOr0, Width

TAPS = 4
"""Width of the convolution in steps, with the current one (Griffin, section 2.4)."""

SHARPNESS = 8.0
"""c of the RG-LRU: a_t = a^(c r_t) (Griffin, eq. 3 and 4)."""


class RGLRU(nn.Module):
    """Real-gated linear recurrent unit (Griffin, eq. 1 to 4), gates block-diagonal in ``heads`` blocks.

        r_t = sigmoid(W_a x_t + b_a),  i_t = sigmoid(W_x x_t + b_x)
        log a_t = -c softplus(-Lambda) r_t                     that is, a_t = sigmoid(Lambda)^(c r_t)
        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t)

    Lambda is initialised so that a^c is uniform in (0.9, 0.999). The recurrence runs in at least float32, also under
    autocast. UserError unless ``width`` is a multiple of ``heads``.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise UserError(f"width {width} is not a multiple of heads {heads}; change one of them.")
        block = width // heads
        self.gates = nn.Parameter(torch.randn(heads, block, 2 * block) * block**-0.5)  # W_a and W_x, side by side
        self.gate_bias = nn.Parameter(torch.zeros(heads, 2 * block))
        decay = torch.empty(width).uniform_(0.9, 0.999).pow(1 / SHARPNESS)
        self.decay_logit = nn.Parameter(torch.logit(decay))  # Lambda

    def forward(self, x: Tensor, state: Tensor | None = None, *, backend: str = "auto") -> Tensor:
        """x (b, t, w), state h_0 (b, w) or None for zeros -> h_1 .. h_t (b, t, w), in at least float32."""
        heads = self.gates.shape[0]
        gates = torch.einsum("bthi,hij->bthj", x.unflatten(-1, (heads, -1)), self.gates) + self.gate_bias
        with torch.autocast(x.device.type, enabled=False):
            precise = torch.promote_types(x.dtype, torch.float32)
            recurrence, entry = torch.sigmoid(gates.to(precise)).chunk(2, -1)
            log_decay = -SHARPNESS * F.softplus(-self.decay_logit.to(precise)) * recurrence.flatten(-2)
            scale = torch.sqrt(-torch.expm1(2 * log_decay) + 1e-12)  # its slope at 0 must be finite
            drive = scale * entry.flatten(-2) * x.to(precise)
            return linear_scan(log_decay.exp(), drive, state, backend=backend)


class HawkBlock(Block):
    """x + recurrence(norm(x)), then x + mlp(norm(x)); MLP with ReLU."""

    def __init__(self, dim: int, *, width: int, heads: int, mlp_dim: int, dim_condition: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.recurrence_norm = Norm(dim, dim_condition)
        self.to_branches = nn.Linear(dim, 2 * width)
        self.taps = nn.Parameter(torch.randn(TAPS, width) * (0.1 / TAPS) ** 0.5)
        self.tap_bias = nn.Parameter(torch.zeros(width))
        self.unit = RGLRU(width, heads=heads)
        self.to_out = nn.Linear(width, dim)
        self._make_mlp(dim, mlp_dim, dim_condition)
        for linear in (self.to_branches, self.to_out, self.mlp_in, self.mlp_out):
            variance_scaling_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        recent: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (b, t, n), after state (b, w) and recent (b, TAPS - 1, w) if given -> (b, t, n), next state and recent.
        condition (b, c), if the block was made for one."""
        passed, entering = self.to_branches(self.recurrence_norm(x, condition)).chunk(2, -1)
        before = entering.new_zeros(entering.shape[0], TAPS - 1, self.width) if recent is None else recent
        window = torch.cat([before.to(entering.dtype), entering], 1)
        steps = x.shape[1]
        mixed = sum((self.taps[k] * window[:, k : k + steps] for k in range(TAPS)), self.tap_bias)
        hidden = self.unit(mixed, state)
        x = x + self.to_out(hidden.to(passed.dtype) * F.gelu(passed))
        return self._add_mlp(x, condition), hidden[:, -1], window[:, -(TAPS - 1) :]


class HawkBody(Body):
    """A causal stack of Hawk blocks, an alternative to `AttentionBody`, which explains dim_condition and final_norm."""

    @checked_kinds
    def __init__(
        self,
        dim: Width,
        *,
        depth: DepthOr0,
        width: Width | None = None,
        heads: Width = 8,
        mlp_dim: Width | None = None,
        dim_condition: Width | None = None,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self.width = dim if width is None else width
        self.sizes = {"width": self.width, "heads": heads, "mlp_dim": mlp_dim or 2 * dim}
        self.layout = ("hawk", depth, *((self.width,) if depth else ()))
        self.blocks = nn.ModuleList(HawkBlock(dim, **self.sizes, dim_condition=dim_condition) for _ in range(depth))
        self.final_norm = Norm(dim, dim_condition) if final_norm else None

    def forward(self, x: Tensor, cache: HawkCache | None = None, condition: Tensor | None = None) -> Tensor:
        for index, block in enumerate(self.blocks):
            if cache is None:
                x, _, _ = block(x, condition=condition)
            else:
                x, state, recent = block(x, cache.states[index], cache.recent[index], condition)
                cache.states[index], cache.recent[index] = state.detach(), recent.detach()
        if cache is not None:
            cache.length += x.shape[1]
        return x if self.final_norm is None else self.final_norm(x, condition)

    def empty_cache(self, batch: int, capacity: int = 0) -> HawkCache:
        """The cache of ``batch`` rows before their first step; its size does not depend on ``capacity``."""
        weight = next(self.parameters(), torch.empty(0))
        precise = torch.promote_types(weight.dtype, torch.float32)
        return HawkCache(
            states=[weight.new_zeros(batch, self.width, dtype=precise) for _ in self.blocks],
            recent=[weight.new_zeros(batch, TAPS - 1, self.width) for _ in self.blocks],
        )

    def cache_store(self, batch: int, device: torch.device) -> HawkStore:
        return HawkStore(self.empty_cache(batch))
