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


class RunningStatistics:
    """Mean and variance of rows (n, d) that come in pieces (Chan, Golub and LeVeque, 1983)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean, self.squares, self.largest = np.zeros(size), np.zeros(size), np.zeros(size)

    def add(self, rows: np.ndarray) -> None:
        """Rows (m, d) more."""
        values = np.asarray(rows, dtype=np.float64)
        count, mean = len(values), values.mean(0)
        total, difference = self.count + count, mean - self.mean
        self.squares += ((values - mean) ** 2).sum(0) + difference**2 * (self.count * count / total)
        self.mean += difference * (count / total)
        self.largest = np.maximum(self.largest, np.abs(values).max(0))
        self.count = total

    @property
    def constant(self) -> np.ndarray:
        """(d,) bool: which entries float32 cannot tell from constant ones."""
        return self._deviation <= np.maximum(PRECISION * self.largest, np.finfo(np.float32).tiny)

    @property
    def std(self) -> np.ndarray:
        """(d,): of the rows so far, 1 for constant entries."""
        return np.where(self.constant, 1.0, self._deviation)

    @property
    def _deviation(self) -> np.ndarray:
        return np.sqrt(self.squares / max(self.count, 1))


def normalization(
    array: np.ndarray, what: str = "values", used: np.ndarray | None = None, piece: int = 65536
) -> dict[str, list[float]]:
    """Mean and standard deviation of the rows of array (n, ...), flattened, as options of encoders and readouts.

    what: what the rows are, for a line on standard error that names the entries that are constant. used (n,) bool:
    which rows count; all by default.
    """
    statistics = RunningStatistics(math.prod(array.shape[1:]))
    for rows in _pieces(array, used, piece):
        statistics.add(rows.reshape(len(rows), -1))
    constant = np.flatnonzero(statistics.constant).tolist()
    if constant:
        named = ", ".join(map(str, constant[:SHOWN])) + ", ..." * (len(constant) > SHOWN)
        print(
            f"metacontroller: {len(constant)} of {len(statistics.mean)} entries of the {what} are constant in the data "
            f"and are not scaled: {named}.",
            file=sys.stderr,
            flush=True,
        )
    return {"mean": statistics.mean.tolist(), "std": statistics.std.tolist()}


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
