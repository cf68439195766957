"""Which episodes of a dataset are held out for validation: some of its distinct ones, chosen by their content alone."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np

from metacontroller.data.store import Episodes


def held_out_rows(episodes: Episodes, share: float) -> np.ndarray:
    """Indices of the episodes to hold out, in order: about this share of them, at least one where there are two.

    Episodes equal in states and actions stay together, so that none held out is trained on, and content alone decides,
    so that all phases and seeds agree. Nothing is held out for a share of 0, nor where each episode occurs so often
    that it alone would be more than the share.
    """
    if not share:
        return np.arange(0)
    rows_of: dict[bytes, list[int]] = defaultdict(list)
    for row in range(len(episodes)):
        rows_of[_digest(episodes, row)].append(row)
    most = min(max(1, round(share * len(episodes))), len(episodes) - 1)
    kept: list[int] = []
    for _, rows in sorted(rows_of.items()):  # digests are as good as random numbers
        if len(kept) + len(rows) <= most:
            kept += rows
    return np.array(sorted(kept), dtype=np.int64)


def steps_trained_on(episodes: Episodes, field: str, held_out: np.ndarray) -> np.ndarray:
    """(n,) bool: which rows of the states or actions are of episodes that are not held out."""
    used, extra = np.ones(len(episodes.arrays[field]), dtype=bool), int(field == "states")
    for row in held_out:
        used[episodes.starts[row] + extra * row : episodes.starts[row + 1] + extra * (row + 1)] = False
    return used


def _digest(episodes: Episodes, row: int) -> bytes:
    """Of the states and actions of an episode."""
    digest, start, end = hashlib.blake2b(digest_size=16), episodes.starts[row], episodes.starts[row + 1]
    digest.update(episodes.arrays["states"][start + row : end + row + 1].tobytes())
    digest.update(episodes.arrays["actions"][start:end].tobytes())
    return digest.digest()
