"""What bodies remember while acting: of episodes that step together a cache, of others a store of rows.

A store's rows are taken out, stepped as one batch, and put back; each has as many steps behind it as it has taken.
Axes: b rows of a cache or a store, m rows of a batch, s steps, h heads, d head width, w recurrent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.errors import UserError

HEADROOM = 16  # steps that the cache of rows taken from a store has room for before it must grow


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

    @property
    def layout(self) -> tuple[Any, ...]:
        """What bodies that can go on from it have in common."""
        return ("attention", len(self.keys), *(self.keys[0].shape[2:] if self.keys else ()))

    def room(self, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Where a product may be written that has as many elements as the keys so far; None while gradients are
        recorded."""
        if torch.is_grad_enabled():
            return None
        size = math.prod(shape) * dtype.itemsize
        if self.scratch is None or len(self.scratch) < size:
            self.scratch = self.keys[0].new_empty(self.keys[0].numel() * dtype.itemsize, dtype=torch.uint8)
        return self.scratch[:size].view(dtype).view(shape)

    def grow(self, steps: int) -> None:
        """Makes room for so many more steps; ``bias`` is the body's to grow."""
        self.keys, self.values = _longer(self.keys, steps), _longer(self.values, steps)
        if self.padding is not None:
            self.padding = F.pad(self.padding, (0, 0, 0, 0, 0, steps))

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


@dataclass
class HawkCache:
    """What a stack carries from step to step, without gradient.

    states: per block the recurrence's (b, w), float32. recent: per block the convolution's last inputs
    (b, TAPS - 1, w). length: steps so far, the same for every row.
    """

    states: list[Tensor]
    recent: list[Tensor]
    length: int = 0

    @property
    def layout(self) -> tuple[Any, ...]:
        """What bodies that can go on from it have in common."""
        return ("hawk", len(self.states), *(self.states[0].shape[1:] if self.states else ()))

    def keep(self, rows: Tensor) -> None:
        """Keeps only the rows with indices ``rows``, int64 (m,)."""
        self.states = [state[rows] for state in self.states]
        self.recent = [recent[rows] for recent in self.recent]


class AttentionStore:
    """Keys and values of ``batch`` rows, each with its number of steps. body: an `AttentionBody`."""

    def __init__(self, body: Any, batch: int, device: torch.device) -> None:
        empty: AttentionCache = body.empty_cache(batch, HEADROOM)
        self.body = body
        self.keys = [torch.zeros_like(keys) for keys in empty.keys]  # (capacity, b, h, d); finite where nothing is
        self.values = [torch.zeros_like(values) for values in empty.values]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    def take(self, rows: Tensor) -> AttentionCache:
        """A copy of rows (m,) as the cache of one batch: their last steps are aligned, and shorter rows are padded."""
        lengths = self.lengths[rows]
        longest = _longest(lengths)
        cache: AttentionCache = self.body.empty_cache(len(rows), longest + HEADROOM)
        cache.length = longest
        if longest == 0:
            return cache
        time = torch.arange(longest, device=rows.device)[:, None] - (longest - lengths)  # (s, m), negative: padding
        index = (time.clamp_min(0) * len(self.lengths) + rows).flatten()
        for source, buffer in self._beside(cache):
            torch.index_select(source.flatten(0, 1), 0, index, out=buffer[:longest].flatten(0, 1))
        if bool((lengths < longest).any()):
            padding = torch.zeros(time.shape, device=rows.device).masked_fill(time < 0, -torch.inf)
            cache.padding = F.pad(padding, (0, 0, 0, HEADROOM))[..., None]
        return cache

    def put(self, rows: Tensor, cache: AttentionCache, at: Tensor, steps: int) -> None:
        """Appends the last ``steps`` steps of the batch's rows ``at`` (m,) to the store's ``rows`` (m,)."""
        capacity, needed = len(self.keys[0]) if self.keys else 0, _longest(self.lengths[rows]) + steps
        if needed > capacity:
            extra = max(needed, 2 * capacity) - capacity
            self.keys, self.values = _longer(self.keys, extra), _longer(self.values, extra)
        time = self.lengths[rows] + torch.arange(steps, device=rows.device)[:, None]
        index = (time * len(self.lengths) + rows).flatten()
        for target, buffer in self._beside(cache):
            new = buffer[cache.length - steps : cache.length].index_select(1, at)
            target.flatten(0, 1).index_copy_(0, index, new.flatten(0, 1))
        self.lengths[rows] += steps

    def restart(self, rows: Tensor) -> None:
        """Rows (m,) before the first step of a new episode."""
        self.lengths[rows] = 0

    def _beside(self, cache: AttentionCache) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of the store's buffers, and the cache's."""
        return zip([*self.keys, *self.values], [*cache.keys, *cache.values], strict=True)


class HawkStore:
    """States and recent inputs of the rows of a cache; they do not depend on the number of steps."""

    def __init__(self, rows: HawkCache) -> None:
        self.rows = rows

    def take(self, rows: Tensor) -> HawkCache:
        """A copy of rows (m,) as the cache of one batch."""
        cache = HawkCache(list(self.rows.states), list(self.rows.recent))
        cache.keep(rows)
        return cache

    def put(self, rows: Tensor, cache: HawkCache, at: Tensor, steps: int) -> None:
        """Stores the batch's rows ``at`` (m,), taken ``steps`` steps ago, as the store's ``rows`` (m,)."""
        buffers = [*cache.states, *cache.recent]
        for target, buffer in zip([*self.rows.states, *self.rows.recent], buffers, strict=True):
            target[rows] = buffer[at].to(target.dtype)

    def restart(self, rows: Tensor) -> None:
        """Rows (m,) before the first step of a new episode."""
        for values in (*self.rows.states, *self.rows.recent):
            values[rows] = 0.0


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0


def _longer(buffers: list[Tensor], steps: int) -> list[Tensor]:
    return [F.pad(buffer, (0, 0, 0, 0, 0, 0, 0, steps)) for buffer in buffers]


@dataclass
class ModelCache:
    """The caches of both bodies. A model may have others, with the same method."""

    lower: Any
    upper: Any

    def keep(self, rows: Tensor) -> None:
        """Keeps only the episodes with indices ``rows``, int64 (m,), in place."""
        self.lower.keep(rows)
        self.upper.keep(rows)


@dataclass
class ModelStore:
    """The stores of both bodies. A model may have others, with the methods ``take`` and ``put`` of `HawkStore`."""

    lower: Any
    upper: Any

    def restart(self, rows: Tensor) -> None:
        """Rows (m,) of both before the first step of a new episode."""
        self.lower.restart(rows)
        self.upper.restart(rows)


def check_unused(cache: Any, steps: int) -> None:
    """UserError for the cache of ``steps`` steps that was continued since: a step writes into its buffers."""
    written = getattr(cache, "length", steps)
    if written > steps:
        raise UserError(
            f"the cache of step {steps} was continued before, up to step {written}, and serves only once; give that of "
            "the last step, or begin again without one."
        )
