"""Pre-norm attention blocks with T5's bucketed relative position bias and a key-value cache (paper §D.1).

Axes: b batch, t query steps, s key steps, h heads, d head width, n model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class AttentionCache:
    """Keys and values of the steps seen so far, one pair of buffers a block; they carry no gradient.

    keys, values: per block (b, h, capacity, d). length: steps already written, the same for every row.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    def index(self, rows: Tensor) -> AttentionCache:
        """The cache of the rows named, for a batch from which finished episodes are dropped."""
        return AttentionCache(
            keys=[self._keep(keys, rows) for keys in self.keys],
            values=[self._keep(values, rows) for values in self.values],
            length=self.length,
        )

    def _keep(self, buffer: Tensor, rows: Tensor) -> Tensor:
        kept = buffer.new_empty(len(rows), *buffer.shape[1:])
        torch.index_select(buffer[:, :, : self.length], 0, rows, out=kept[:, :, : self.length])
        return kept


class RelativePositionBias(nn.Module):
    """T5's learned bias per head and distance bucket: near distances exactly, far ones in logarithmic buckets.

    Each block has one of its own (T5 shares one among all), so that a stack can be split at any block for steering.
    """

    def __init__(self, heads: int, *, causal: bool, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.causal, self.buckets, self.max_distance = causal, buckets, max_distance
        self.table = nn.Parameter(torch.zeros(heads, buckets))

    def forward(self, queries: int, keys: int) -> Tensor:
        """(h, queries, keys) bias; the queries are the last ones of the keys. Future keys get -inf if causal."""
        index, future = _bucket_index(
            queries, keys, self.causal, self.buckets, self.max_distance, str(self.table.device)
        )
        bias = self.table[:, index]
        return bias.masked_fill(future, -math.inf) if self.causal else bias


@cache
def _bucket_index(
    queries: int, keys: int, causal: bool, buckets: int, max_distance: int, device: str
) -> tuple[Tensor, Tensor]:
    """Bucket of each (query, key) pair, and whether the key lies in the query's future; both (queries, keys)."""
    with torch.inference_mode(False):  # what is kept must serve training too
        query = torch.arange(keys - queries, keys, device=device)[:, None]
        distance = query - torch.arange(keys, device=device)[None]
        return distance_bucket(distance, causal=causal, buckets=buckets, max_distance=max_distance), distance < 0


def distance_bucket(distance: Tensor, *, causal: bool, buckets: int, max_distance: int) -> Tensor:
    """Bucket of a distance (query position - key position); two-sided unless causal."""
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


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); MLP with ReLU."""

    def __init__(self, dim: int, *, heads: int, dim_head: int, mlp_dim: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.bias = RelativePositionBias(heads, causal=causal)
        self.attention_norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, mlp_dim)
        self.mlp_out = nn.Linear(mlp_dim, dim)
        for linear in (self.to_qkv, self.to_out, self.mlp_in, self.mlp_out):
            variance_scaling_(linear.weight)
        nn.init.zeros_(self.mlp_in.bias)
        nn.init.zeros_(self.mlp_out.bias)

    def forward(
        self, x: Tensor, hidden_keys: Tensor | None = None, cache: AttentionCache | None = None, block: int = 0
    ) -> Tensor:
        """x (b, t, n) -> (b, t, n). hidden_keys (b, 1, 1, s): -inf at keys that no query may see, else 0."""
        q, k, v = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = cache.length + x.shape[1]
            cache.keys[block][:, :, cache.length : end] = k.detach()
            cache.values[block][:, :, cache.length : end] = v.detach()
            if cache.length:
                k, v = cache.keys[block][:, :, :end], cache.values[block][:, :, :end]
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + self.bias(q.shape[2], k.shape[2])
        if hidden_keys is not None:
            scores = scores + hidden_keys
        mixed = torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2)
        x = x + self.to_out(mixed)
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))))


class AttentionBody(nn.Module):
    """A stack of blocks. Causal for models; two-sided for embedders. Depth 0 passes its input on."""

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        heads: int = 4,
        dim_head: int | None = None,
        mlp_dim: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth is {depth}; expected a number of blocks, 0 or more.")
        if dim < 1 or heads < 1:
            raise ValueError(f"dim is {dim} and heads {heads}; expected at least 1 each.")
        if dim_head is None and dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}; change one or give dim_head.")
        self.heads = heads
        self.dim_head = dim // heads if dim_head is None else dim_head
        self.sizes = {"heads": heads, "dim_head": self.dim_head, "mlp_dim": mlp_dim or 2 * dim}
        self.blocks = nn.ModuleList(AttentionBlock(dim, **self.sizes, causal=causal) for _ in range(depth))

    def forward(self, x: Tensor, cache: AttentionCache | None = None, mask: Tensor | None = None) -> Tensor:
        """x (b, t, n) -> (b, t, n); with a cache, x continues it. mask (b, t) bool hides padding (two-sided only)."""
        steps = x.shape[1]
        seen = 0 if cache is None else cache.length
        hidden_keys = None
        if mask is not None:
            hidden_keys = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)[:, None, None]
        if cache is not None and self.blocks:
            self._grow(cache, seen + steps)
        for index, block in enumerate(self.blocks):
            x = block(x, hidden_keys, cache, index)
        if cache is not None:
            cache.length += steps
        return x

    def empty_cache(self, batch: int, capacity: int = 32) -> AttentionCache:
        """An empty cache for ``batch`` rows, with room for ``capacity`` steps before it must grow."""
        shape = (batch, self.heads, capacity, self.dim_head)
        weight = next(self.parameters(), torch.empty(0))  # without blocks there are no buffers, whatever their type
        return AttentionCache(
            keys=[weight.new_empty(shape) for _ in self.blocks], values=[weight.new_empty(shape) for _ in self.blocks]
        )

    @staticmethod
    def _grow(cache: AttentionCache, needed: int) -> None:
        capacity = cache.keys[0].shape[2]
        if needed > capacity:
            extra = max(needed, 2 * capacity) - capacity
            cache.keys = [F.pad(keys, (0, 0, 0, extra)) for keys in cache.keys]
            cache.values = [F.pad(values, (0, 0, 0, extra)) for values in cache.values]


def variance_scaling_(weight: Tensor, scale: float = 0.1) -> None:
    """Normal with variance scale / fan_in, the paper's initialisation (§D.1)."""
    nn.init.normal_(weight, std=math.sqrt(scale / weight.shape[1]))
