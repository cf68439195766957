"""Which episodes of a dataset are for validation, and the scale of those that are trained on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from metacontroller.data.datasets import Dataset
from metacontroller.data.spaces import encoder_options
from metacontroller.data.statistics import normalization, pixel_scale
from metacontroller.data.trajectories import Episodes


@dataclass(frozen=True)
class ValidationSplit:
    """A dataset, and the share of its episodes that are for validation, see `validation_rows`."""

    dataset: Dataset
    share: float

    @cached_property
    def validation(self) -> np.ndarray:
        """Indices of the episodes for validation."""
        return validation_rows(self.dataset.episodes, self.share)

    @cached_property
    def training(self) -> np.ndarray:
        """Indices of all others."""
        return np.setdiff1d(np.arange(len(self.dataset.episodes)), self.validation)

    @cached_property
    def scales(self) -> dict[str, dict[str, list[float]]]:
        """Mean and standard deviation of the states' and of the actions' vectors, or of the channels of images, in what
        is trained on: options of encoder and readout, none for choices."""
        scales, episodes = {}, self.dataset.episodes
        for name, space in (("states", self.dataset.observation_space), ("actions", self.dataset.action_space)):
            options, array = encoder_options(space), episodes.arrays[name]
            used = steps_outside(episodes, name, self.validation)
            if name == "states" and "image" in options:
                scales[name] = pixel_scale(array, options["image"], used)
            elif "num_discrete" not in options:
                scales[name] = normalization(array, "observations" if name == "states" else name, used)
        return scales


def validation_rows(episodes: Episodes, share: float) -> np.ndarray:
    """Indices of the episodes for validation, in order: about this share of them, at least one where there are two.

    They are chosen by their content alone, so that all phases and seeds agree. Episodes equal in states and actions
    stay together, so that none for validation is trained on. There are none for a share of 0, nor where each episode
    occurs so often that it alone would be more than the share.
    """
    if not share:
        return np.arange(0)
    copies: dict[bytes, list[int]] = defaultdict(list)
    for row in range(len(episodes)):
        copies[_digest(episodes, row)].append(row)
    most = min(max(1, round(share * len(episodes))), len(episodes) - 1)
    chosen: list[int] = []
    for _, rows in sorted(copies.items()):  # digests are as good as random numbers
        if len(chosen) + len(rows) <= most:
            chosen += rows
    return np.array(sorted(chosen), dtype=np.int64)


def steps_outside(episodes: Episodes, field: str, validation: np.ndarray) -> np.ndarray:
    """(n,) bool: which rows of the states or actions are of no episode for validation."""
    used = np.ones(len(episodes.arrays[field]), dtype=bool)
    for episode in validation.tolist():
        used[episodes.rows(field, episode)] = False
    return used


def _digest(episodes: Episodes, episode: int) -> bytes:
    """Of the states and actions of an episode."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("states", "actions"):
        digest.update(episodes.arrays[name][episodes.rows(name, episode)].tobytes())
    return digest.digest()
