"""Pre-norm attention blocks with T5's bucketed relative position bias and a key-value cache (paper §D.1).

Axes: b batch, t query steps, s key steps, h heads, d head width, n model width.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from metacontroller.arguments import checked_kinds
from metacontroller.errors import UserError
from metacontroller.models.blocks import Block, Body, Norm, variance_scaling_
from metacontroller.models.caches import AttentionCache, AttentionStore
from metacontroller.ranges import DepthOr0, Width


class RelativePositionBias(nn.Module):
    """T5's learned bias per head and distance bucket: one bucket per near distance, logarithmic buckets for far ones.

    Each block has its own (T5 shares one among all), so that a stack can be split at any block for steering.
    """

    def __init__(self, heads: int, *, causal: bool, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.causal, self.buckets, self.max_distance = causal, buckets, max_distance
        self.table = nn.Parameter(torch.zeros(heads, buckets))

    def forward(self, queries: int, keys: int, window: int | None = None) -> Tensor:
        """The bias (h, queries, keys), where the queries are the last of the keys; if causal, -inf at future keys and
        at all but a query's last ``window``, its own included."""
        capacity = 1 << (keys - 1).bit_length()  # the lengths up to a power of two share one vector
        by_distance = _buckets_by_distance(
            capacity, self.causal, self.buckets, self.max_distance, str(self.table.device)
        )
        first = capacity - keys  # where the last query's row starts: its distance to key 0 is keys - 1
        rows = by_distance[first : first + queries + keys - 1].unfold(0, keys, 1)  # last query first
        bias = self.table[:, rows.flip(0)]
        if not self.causal:
            return bias
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).triu(keys - queries + 1)
        if window is not None and keys > window:
            hidden |= torch.ones_like(hidden).tril(keys - queries - window)
        return bias.masked_fill(hidden, -math.inf)


@cache
def _buckets_by_distance(capacity: int, causal: bool, buckets: int, max_distance: int, device: str) -> Tensor:
    """(2 capacity - 1,) buckets of the distances capacity - 1 down to 1 - capacity.

    Cached, and called with powers of two only, so that the cache holds less than four entries per step of the longest
    sequence.
    """
    with torch.inference_mode(False):  # what is cached is used in training too
        distance = torch.arange(capacity - 1, -capacity, -1, device=device)
        return distance_bucket(distance, causal=causal, buckets=buckets, max_distance=max_distance)


def distance_bucket(distance: Tensor, *, causal: bool, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance (query position - key position), int64 of the same shape; two-sided unless causal."""
    offset = torch.zeros_like(distance)
    if not causal:
        buckets //= 2
        offset = (distance < 0).long() * buckets
        distance = distance.abs()
    distance = distance.clamp_min(0)
    exact = buckets // 2
    span = math.log(max_distance / exact)
    far = exact + (torch.log(distance.clamp_min(1) / exact) / span * (buckets - exact)).long()
    return offset + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class AttentionBlock(Block):
    """x + attention(norm(x)), then x + mlp(norm(x)); MLP with ReLU.

    window: steps back that a causal block attends to, the current one included; None for all.
    """

    window: int | None = None

    def __init__(
        self, dim: int, *, heads: int, dim_head: int, mlp_dim: int, causal: bool, dim_condition: int | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.bias = RelativePositionBias(heads, causal=causal)
        self.attention_norm = Norm(dim, dim_condition)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self._make_mlp(dim, mlp_dim, dim_condition)
        for linear in (self.to_qkv, self.to_out, self.mlp_in, self.mlp_out):
            variance_scaling_(linear.weight)
        nn.init.zeros_(self.mlp_in.bias)
        nn.init.zeros_(self.mlp_out.bias)

    def forward(
        self,
        x: Tensor,
        hidden_keys: Tensor | None = None,
        cache: AttentionCache | None = None,
        block: int = 0,
        condition: Tensor | None = None,
    ) -> Tensor:
        """x (b, t, n) -> (b, t, n). hidden_keys (b, 1, 1, s): -inf at masked keys, else 0. condition (b, c)."""
        if cache is not None and cache.length and x.shape[1] == 1:
            return self._step(x[:, 0], cache, block, condition)[:, None]
        qkv = self.to_qkv(self.attention_norm(x, condition))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = cache.length + x.shape[1]
            keys, values = cache.keys[block][:end], cache.values[block][:end]
            keys[cache.length :] = k.detach().permute(2, 0, 1, 3)
            values[cache.length :] = v.detach().permute(2, 0, 1, 3)
            if cache.length:
                k, v = keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)
        bias = self.bias(q.shape[2], k.shape[2], self.window)
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + bias
        if hidden_keys is not None:
            scores = scores + hidden_keys
        x = x + self.to_out(torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2))
        return self._add_mlp(x, condition)

    def _step(self, x: Tensor, cache: AttentionCache, block: int, condition: Tensor | None) -> Tensor:
        """One cached step, x (b, n) -> (b, n).

        Bounded by reading the cache, for which elementwise products and sums are faster than b h matrix products of one
        row each.
        """
        now = cache.length
        keys, values = cache.keys[block], cache.values[block]
        qkv = self.to_qkv(self.attention_norm(x, condition)).to(keys.dtype)
        q, k, v = qkv.view(len(x), 3, self.heads, -1).unbind(1)
        keys[now], values[now] = k.detach(), v.detach()
        first = 0 if self.window is None else max(0, now + 1 - self.window)
        keys, values = keys[first : now + 1], values[first : now + 1]
        products = torch.mul(keys, q * q.shape[-1] ** -0.5, out=cache.room(keys.shape, keys.dtype))  # (s, b, h, d)
        scores = products.sum(-1) + cache.bias[block][-len(keys) :]
        if cache.padding is not None:
            scores += cache.padding[first : now + 1]
        shares = scores.softmax(0)[..., None]
        mixed = torch.mul(shares, values, out=cache.room(values.shape, torch.result_type(shares, values))).sum(0)
        x = x + self.to_out(mixed.flatten(1))
        return self._add_mlp(x, condition)


class AttentionBody(Body):
    """A stack of attention blocks, causal or two-sided.

    dim_condition: width of a condition on which the blocks' norms depend. final_norm: whether a norm follows the last
    block, so that the residual that leaves the stack has a fixed scale.
    """

    @checked_kinds
    def __init__(
        self,
        dim: Width,
        *,
        depth: DepthOr0,
        heads: Width = 4,
        dim_head: Width | None = None,
        mlp_dim: Width | None = None,
        causal: bool = True,
        dim_condition: Width | None = None,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        if dim_head is None and dim % heads:
            raise UserError(f"dim {dim} is not a multiple of heads {heads}; change one or give dim_head.")
        self.heads, self.dim_head = heads, dim // heads if dim_head is None else dim_head
        self.sizes = {"heads": heads, "dim_head": self.dim_head, "mlp_dim": mlp_dim or 2 * dim}
        self.layout = ("attention", depth, *((heads, self.dim_head) if depth else ()))
        self.blocks = nn.ModuleList(
            AttentionBlock(dim, **self.sizes, causal=causal, dim_condition=dim_condition) for _ in range(depth)
        )
        self.final_norm = Norm(dim, dim_condition) if final_norm else None

    def forward(
        self,
        x: Tensor,
        cache: AttentionCache | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """As of `Body`; mask (b, t) bool: real steps, if two-sided."""
        hidden_keys = None
        if mask is not None:
            hidden_keys = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)[:, None, None]
        if cache is not None and self.blocks:
            self._grow(cache, cache.length + x.shape[1])
        for index, block in enumerate(self.blocks):
            x = block(x, hidden_keys, cache, index, condition)
        if cache is not None:
            cache.length += x.shape[1]
        return x if self.final_norm is None else self.final_norm(x, condition)

    def limit_context(self, steps: int) -> None:
        """From now on each step attends to the last ``steps`` alone, itself included, whether steps come one by one or
        together. Deeper blocks read what earlier steps have read in their turn."""
        for block in self.blocks:
            block.window = steps  # pyright: ignore[reportArgumentType] - an AttentionBlock

    def empty_cache(self, batch: int, capacity: int = 32) -> AttentionCache:
        shape = (capacity, batch, self.heads, self.dim_head)
        weight = next(self.parameters(), torch.empty(0))  # unused without blocks
        keys, values = ([weight.new_empty(shape) for _ in self.blocks] for _ in range(2))
        return AttentionCache(keys, values, self._step_bias(capacity))

    def cache_store(self, batch: int, device: torch.device) -> AttentionStore:
        return AttentionStore(self, batch, device)

    @torch.no_grad()
    def _step_bias(self, capacity: int) -> list[Tensor]:
        """Per block (capacity, 1, h): the bias of the last of ``capacity`` steps towards each of them."""
        biases = [block.bias for block in self.blocks]
        return [bias(1, capacity).permute(2, 1, 0).contiguous() for bias in biases]  # pyright: ignore[reportCallIssue]

    def _grow(self, cache: AttentionCache, needed: int) -> None:
        capacity = len(cache.keys[0])
        if needed > capacity:
            cache.bias = self._step_bias(max(needed, 2 * capacity))
            cache.grow(max(needed, 2 * capacity) - capacity)
