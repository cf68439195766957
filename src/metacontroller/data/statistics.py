"""Mean and standard deviation of large arrays, a piece at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from metacontroller.data.spaces import channel_axis

SHOWN = 10
"""Constant entries that are named, at most."""
PRECISION = 2.0**-24
"""Of float32, in which models read: what deviates by less, as a share of the largest value, is constant to them."""


def normalization(
    array: np.ndarray, what: str = "values", used: np.ndarray | None = None, piece: int = 65536
) -> dict[str, list[float]]:
    """Mean and standard deviation of the rows of array (n, ...), flattened, as options of encoders and readouts; the
    deviation of constant entries is 1 (Chan, Golub and LeVeque, 1983).

    what: what the rows are, for a line on standard error that names the entries that are constant. used (n,) bool:
    which rows count; all by default.
    """
    mean, squares, largest, count = *np.zeros((3, math.prod(array.shape[1:]))), 0
    for rows in _pieces(array, used, piece):
        values = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)
        total, of_piece = count + len(values), values.mean(0)
        squares += ((values - of_piece) ** 2).sum(0) + (of_piece - mean) ** 2 * (count * len(values) / total)
        mean += (of_piece - mean) * (len(values) / total)
        largest, count = np.maximum(largest, np.abs(values).max(0)), total
    deviation = np.sqrt(squares / max(count, 1))
    constant = deviation <= np.maximum(PRECISION * largest, np.finfo(np.float32).tiny)
    if constant.any():
        entries = np.flatnonzero(constant).tolist()
        shown = ", ".join(map(str, entries[:SHOWN])) + ", ..." * (len(entries) > SHOWN)
        print(
            f"metacontroller: {len(entries)} of {len(mean)} entries of the {what} are constant in the data and are not "
            f"scaled: {shown}.",
            file=sys.stderr,
            flush=True,
        )
    return {"mean": mean.tolist(), "std": np.where(constant, 1.0, deviation).tolist()}


def pixel_scale(
    images: np.ndarray, shape: Sequence[int], used: np.ndarray | None = None, piece: int = 4096
) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of images (n, *shape) uint8, 1 for constant ones; used: as above."""
    axis = channel_axis(shape)
    counts = np.zeros((1 if axis is None else shape[axis], 256), np.int64)
    for rows in _pieces(images, used, piece):
        part = np.asarray(rows, np.uint8).reshape(-1, *shape)
        values = part if axis is None else np.moveaxis(part, 1 + axis, 0)
        for channel, pixels in zip(counts, values.reshape(len(counts), -1), strict=True):
            channel += np.bincount(pixels, minlength=256)
    values, share = np.arange(256), counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    return {"mean": mean.tolist(), "std": np.where(std > 0, std, 1.0).tolist()}


def _pieces(array: np.ndarray, used: np.ndarray | None, piece: int) -> Iterator[np.ndarray]:
    """The rows of an array that are used, so many at a time."""
    for start in range(0, len(array), piece):
        rows = array[start : start + piece]
        rows = rows if used is None else rows[used[start : start + piece]]
        if len(rows):
            yield rows
