"""The caches of episodes that do not step together: rows are taken out, stepped as one batch, and put back.

A row of a store is one episode, with as many steps behind it as it has taken. Axes: b rows of the store, m rows of a
batch, s steps, h heads, d head width, w recurrent width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.models.attention import AttentionBody, AttentionCache
from metacontroller.models.hawk import HawkBody, HawkCache

HEADROOM = 16  # steps that a batch's cache has room for before it must grow


class AttentionStore:
    """Keys and values of ``batch`` rows, each with its own number of steps."""

    def __init__(self, body: AttentionBody, batch: int, device: torch.device) -> None:
        empty = body.empty_cache(batch, HEADROOM)
        self.body = body
        self.keys = [torch.zeros_like(keys) for keys in empty.keys]  # (capacity, b, h, d); finite where nothing is
        self.values = [torch.zeros_like(values) for values in empty.values]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    def take(self, rows: Tensor) -> AttentionCache:
        """A copy of rows (m,) as the cache of one batch: their last steps are aligned, and shorter rows are padded."""
        lengths = self.lengths[rows]
        longest = _longest(lengths)
        cache = self.body.empty_cache(len(rows), longest + HEADROOM)
        cache.length = longest
        if longest == 0:
            return cache
        time = torch.arange(longest, device=rows.device)[:, None] - (longest - lengths)  # (s, m), negative: padding
        index = (time.clamp_min(0) * len(self.lengths) + rows).flatten()
        for stored, buffers in ((self.keys, cache.keys), (self.values, cache.values)):
            for source, buffer in zip(stored, buffers, strict=True):
                torch.index_select(source.flatten(0, 1), 0, index, out=buffer[:longest].flatten(0, 1))
        if bool((lengths < longest).any()):
            padding = torch.zeros(time.shape, device=rows.device).masked_fill(time < 0, -torch.inf)
            cache.padding = F.pad(padding, (0, 0, 0, HEADROOM))[..., None]
        return cache

    def put(self, rows: Tensor, cache: AttentionCache, at: Tensor, steps: int) -> None:
        """Appends the last ``steps`` steps of the batch's rows ``at`` (m,) to the store's ``rows`` (m,)."""
        self._grow(_longest(self.lengths[rows]) + steps)
        time = self.lengths[rows] + torch.arange(steps, device=rows.device)[:, None]
        index = (time * len(self.lengths) + rows).flatten()
        for stored, buffers in ((self.keys, cache.keys), (self.values, cache.values)):
            for target, buffer in zip(stored, buffers, strict=True):
                new = buffer[cache.length - steps : cache.length].index_select(1, at)
                target.flatten(0, 1).index_copy_(0, index, new.flatten(0, 1))
        self.lengths[rows] += steps

    def restart(self, rows: Tensor) -> None:
        """Rows (m,) before the first step of a new episode."""
        self.lengths[rows] = 0

    def _grow(self, needed: int) -> None:
        capacity = len(self.keys[0]) if self.keys else needed
        if needed > capacity:
            extra = (0, 0, 0, 0, 0, 0, 0, max(needed, 2 * capacity) - capacity)
            self.keys = [F.pad(keys, extra) for keys in self.keys]
            self.values = [F.pad(values, extra) for values in self.values]


class HawkStore:
    """States and recent inputs of ``batch`` rows; they do not depend on the number of steps."""

    def __init__(self, body: HawkBody, batch: int) -> None:
        self.rows = body.empty_cache(batch)

    def take(self, rows: Tensor) -> HawkCache:
        """A copy of rows (m,) as the cache of one batch."""
        cache = HawkCache(list(self.rows.states), list(self.rows.recent))
        cache.keep(rows)
        return cache

    def put(self, rows: Tensor, cache: HawkCache, at: Tensor, steps: int) -> None:
        """Stores the batch's rows ``at`` (m,) as the store's ``rows`` (m,)."""
        for stored, buffers in ((self.rows.states, cache.states), (self.rows.recent, cache.recent)):
            for target, buffer in zip(stored, buffers, strict=True):
                target[rows] = buffer[at].to(target.dtype)

    def restart(self, rows: Tensor) -> None:
        """Rows (m,) before the first step of a new episode."""
        for values in (*self.rows.states, *self.rows.recent):
            values[rows] = 0.0


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0


BodyStore = AttentionStore | HawkStore


@dataclass
class ModelStore:
    """The stores of both bodies, as the phases use them."""

    lower: BodyStore
    upper: BodyStore

    def restart(self, rows: Tensor) -> None:
        """Rows (m,) of both before the first step of a new episode."""
        self.lower.restart(rows)
        self.upper.restart(rows)


def make_body_store(body: AttentionBody | HawkBody, batch: int, device: torch.device) -> BodyStore:
    """The store for one body."""
    return AttentionStore(body, batch, device) if isinstance(body, AttentionBody) else HawkStore(body, batch)


def check_unused(cache: Any, steps: int) -> None:
    """UserError for the cache of ``steps`` steps that was continued since: a step writes into its buffers."""
    written = getattr(cache, "length", steps)
    if written > steps:
        raise UserError(
            f"the cache of step {steps} was continued before, up to step {written}, and serves only once; give that of "
            "the last step, or begin again without one."
        )
