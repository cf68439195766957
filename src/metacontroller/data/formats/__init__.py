"""Formats in which others keep datasets, one file each.

A format has a function ``matches(name) -> bool``, whether it is asked for a dataset of this name, and ``read(name) ->
Source``; a line in `data.datasets.FORMATS` registers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gymnasium import spaces


class Source(NamedTuple):
    """A dataset as a format gives it: what `data.datasets.Dataset` has, with the episodes one by one.

    episodes: each with the number by which errors name it, a mapping as `Trajectories.from_episodes` takes it, with
    states and actions as in `data.spaces`.
    """

    episodes: Iterator[tuple[int, Mapping[str, Any]]]
    observation_space: spaces.Space
    action_space: spaces.Space
    env: str | None = None
    env_kwargs: str | None = None
    env_steps: int | None = None
    versions: Mapping[str, str] = {}
