"""Mean and standard deviation of large arrays, a piece at a time."""

from __future__ import annotations

import numpy as np

MIN_STD = 1e-6
"""Below which an entry counts as constant; it is divided by 1 then."""


class RunningStatistics:
    """Mean and variance of rows (n, d) that come in pieces (Chan, Golub and LeVeque, 1983)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean, self.squares = np.zeros(size), np.zeros(size)

    def add(self, rows: np.ndarray) -> None:
        """Rows (m, d) more."""
        values = np.asarray(rows, dtype=np.float64)
        count, mean = len(values), values.mean(0)
        total, difference = self.count + count, mean - self.mean
        self.squares += ((values - mean) ** 2).sum(0) + difference**2 * (self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """(d,): of the rows so far, 1 for constant entries."""
        std = np.sqrt(self.squares / max(self.count, 1))
        return np.where(std < MIN_STD, 1.0, std)


def normalization(array: np.ndarray, piece: int = 65536) -> dict[str, list[float]]:
    """Mean and standard deviation of the rows of array (n, d), as options of encoders and readouts."""
    statistics = RunningStatistics(array.shape[1])
    for start in range(0, len(array), piece):
        statistics.add(array[start : start + piece])
    return {"mean": statistics.mean.tolist(), "std": statistics.std.tolist()}
