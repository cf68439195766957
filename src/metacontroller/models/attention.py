"""Pre-norm attention blocks with T5's bucketed relative position bias and a key-value cache (paper §D.1).

Axes: b batch, t query steps, s key steps, h heads, d head width, n model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.models.condition import make_norm, normalized
from metacontroller.ranges import MOST_DEPTH, MOST_WIDTH, WIDTH, Whole, check_number


@dataclass
class AttentionCache:
    """Keys and values of the steps so far, a pair of buffers per block; they carry no gradient.

    keys, values: per block (capacity, b, h, d); time comes first, so that writing a step and reading all steps so far
    are contiguous. bias: per block (capacity, 1, h), the position bias at distances capacity - 1 to 0. length: steps
    already written, the same for every row. padding (capacity, b, 1), if rows did not begin together: -inf at steps
    before a row's first, else 0; read only where one step is taken. scratch: memory for products, used again at each
    step: to ask for a little more of it at each would leave holes that grow with the square of the steps.
    """

    keys: list[Tensor]
    values: list[Tensor]
    bias: list[Tensor]
    length: int = 0
    padding: Tensor | None = None
    scratch: Tensor | None = None

    def room(self, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Where a product may be written that has as many elements as the keys so far; None while gradients are
        recorded."""
        if torch.is_grad_enabled():
            return None
        size = math.prod(shape) * dtype.itemsize
        if self.scratch is None or len(self.scratch) < size:
            self.scratch = self.keys[0].new_empty(self.keys[0].numel() * dtype.itemsize, dtype=torch.uint8)
        return self.scratch[:size].view(dtype).view(shape)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What bodies that can go on from it have in common."""
        return ("attention", len(self.keys), *(self.keys[0].shape[2:] if self.keys else ()))

    def keep(self, rows: Tensor) -> None:
        """Keeps only the rows with indices ``rows``, int64 (m,), in place; only rows whose index changes are copied.
        Rows may repeat, so that there are more than before; then all are copied."""
        self.padding = None if self.padding is None else self.padding[:, rows]
        if self.keys and len(rows) > self.keys[0].shape[1]:
            self.keys = [keys[:, rows] for keys in self.keys]
            self.values = [values[:, rows] for values in self.values]
            return
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        for buffers in (self.keys, self.values):
            for block, buffer in enumerate(buffers):
                used = buffer[: self.length]
                used.index_copy_(1, moved, used.index_select(1, rows[moved]))
                buffers[block] = buffer[:, : len(rows)]


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


class AttentionBlock(nn.Module):
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
        self.attention_norm = make_norm(dim, dim_condition)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.mlp_norm = make_norm(dim, dim_condition)
        self.mlp_in = nn.Linear(dim, mlp_dim)
        self.mlp_out = nn.Linear(mlp_dim, dim)
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
        qkv = self.to_qkv(normalized(self.attention_norm, x, condition))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = cache.length + x.shape[1]
            keys, values = cache.keys[block][:end], cache.values[block][:end]
            keys[cache.length :], values[cache.length :] = (
                k.detach().permute(2, 0, 1, 3),
                v.detach().permute(2, 0, 1, 3),
            )
            if cache.length:
                k, v = keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + self.bias(
            q.shape[2], k.shape[2], self.window
        )
        if hidden_keys is not None:
            scores = scores + hidden_keys
        x = x + self.to_out(torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.relu(self.mlp_in(normalized(self.mlp_norm, x, condition))))

    def _step(self, x: Tensor, cache: AttentionCache, block: int, condition: Tensor | None) -> Tensor:
        """One cached step, x (b, n) -> (b, n).

        Bounded by reading the cache, for which elementwise products and sums are faster than b h matrix products of one
        row each.
        """
        now = cache.length
        keys, values = cache.keys[block], cache.values[block]
        qkv = self.to_qkv(normalized(self.attention_norm, x, condition)).to(keys.dtype)
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
        return x + self.mlp_out(F.relu(self.mlp_in(normalized(self.mlp_norm, x, condition))))


class AttentionBody(nn.Module):
    """A stack of blocks, causal or two-sided. Depth 0 returns its input. UserError for sizes that do not fit.

    dim_condition: width of a condition on which the blocks' norms depend. final_norm: whether a norm follows the last
    block, so that the residual that leaves the stack has a fixed scale.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        heads: int = 4,
        dim_head: int | None = None,
        mlp_dim: int | None = None,
        causal: bool = True,
        dim_condition: int | None = None,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        check_number("depth", depth, Whole(0, MOST_DEPTH))
        check_number("dim", dim, WIDTH)
        check_number("heads", heads, WIDTH)
        check_number("dim_head", dim_head, Whole(most=MOST_WIDTH, none=True))
        check_number("mlp_dim", mlp_dim, Whole(most=MOST_WIDTH, none=True))
        if dim_head is None and dim % heads:
            raise UserError(f"dim {dim} is not a multiple of heads {heads}; change one or give dim_head.")
        self.heads = heads
        self.dim_head = dim // heads if dim_head is None else dim_head
        self.sizes = {"heads": heads, "dim_head": self.dim_head, "mlp_dim": mlp_dim or 2 * dim}
        self.blocks = nn.ModuleList(
            AttentionBlock(dim, **self.sizes, causal=causal, dim_condition=dim_condition) for _ in range(depth)
        )
        self.final_norm = make_norm(dim, dim_condition) if final_norm else None
        self.layout = ("attention", depth, *((heads, self.dim_head) if depth else ()))

    def forward(
        self,
        x: Tensor,
        cache: AttentionCache | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """x (b, t, n) -> (b, t, n); with a cache, x follows its steps. mask (b, t) bool: real steps, if two-sided.
        condition (b, c), if the body was made for one."""
        steps = x.shape[1]
        seen = 0 if cache is None else cache.length
        hidden_keys = None
        if mask is not None:
            hidden_keys = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)[:, None, None]
        if cache is not None and self.blocks:
            self._grow(cache, seen + steps)
        for index, block in enumerate(self.blocks):
            x = block(x, hidden_keys, cache, index, condition)
        if cache is not None:
            cache.length += steps
        return x if self.final_norm is None else normalized(self.final_norm, x, condition)

    def limit_context(self, steps: int) -> None:
        """From now on each step attends to the last ``steps`` alone, itself included, whether steps come one by one or
        together. Deeper blocks read what earlier steps have read in their turn."""
        for block in self.blocks:
            block.window = steps  # pyright: ignore[reportArgumentType] - an AttentionBlock

    def empty_cache(self, batch: int, capacity: int = 32) -> AttentionCache:
        """An empty cache for ``batch`` rows, with room for ``capacity`` steps before it has to grow."""
        shape = (capacity, batch, self.heads, self.dim_head)
        weight = next(self.parameters(), torch.empty(0))  # unused without blocks
        return AttentionCache(
            keys=[weight.new_empty(shape) for _ in self.blocks],
            values=[weight.new_empty(shape) for _ in self.blocks],
            bias=self._step_bias(capacity),
        )

    @torch.no_grad()
    def _step_bias(self, capacity: int) -> list[Tensor]:
        """Per block (capacity, 1, h): the bias of the last of ``capacity`` steps towards each of them."""
        biases = [block.bias for block in self.blocks]
        return [bias(1, capacity).permute(2, 1, 0).contiguous() for bias in biases]  # pyright: ignore[reportCallIssue]

    def _grow(self, cache: AttentionCache, needed: int) -> None:
        capacity = len(cache.keys[0])
        if needed > capacity:
            capacity, old = max(needed, 2 * capacity), capacity
            extra = (0, 0, 0, 0, 0, 0, 0, capacity - old)
            cache.bias = self._step_bias(capacity)
            cache.keys = [F.pad(keys, extra) for keys in cache.keys]
            cache.values = [F.pad(values, extra) for values in cache.values]
            if cache.padding is not None:
                cache.padding = F.pad(cache.padding, extra[2:])


def variance_scaling_(weight: Tensor, scale: float = 0.1) -> None:
    """Normal with variance scale / fan_in, the paper's initialisation (§D.1)."""
    nn.init.normal_(weight, std=math.sqrt(scale / weight.shape[1]))
