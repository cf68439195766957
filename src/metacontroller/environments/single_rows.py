"""Episodes that step one by one behind the interface of a batch, for worlds whose batches cannot replace rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metacontroller.domains.base import BatchedEnv


def _joined(name: str) -> Any:
    return property(lambda self: torch.cat([getattr(row, name) for row in self.rows]))


class SingleRows(BatchedEnv):
    """Batches of one episode each as one batch; slow, since they step in a loop."""

    observation = _joined("observation")
    terminated = _joined("terminated")
    truncated = _joined("truncated")
    success = _joined("success")
    steps = _joined("steps")
    subgoals_done = _joined("subgoals_done")
    lost = _joined("lost")  # AttributeError where the world's batches have none

    def __init__(self, rows: Sequence[BatchedEnv]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def step(self, actions: Tensor) -> Tensor:
        return torch.cat([row.step(action[None]) for row, action in zip(self.rows, actions, strict=True)])

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]

    def replace(self, rows: Tensor, other: SingleRows) -> None:
        """Replaces the episodes ``rows``, int64 (m,), by those of another batch."""
        for row, new in zip(rows.tolist(), other.rows, strict=True):
            self.rows[row] = new

    def goal(self) -> Tensor:
        return torch.cat([row.goal() for row in self.rows])

    def reached(self) -> Tensor:
        return torch.cat([row.reached() for row in self.rows])
