"""The expert's episodes on disk: written once, memory-mapped, and read by all phases and runs of the same plane.

The same recipe with the same version of MuJoCo on the same kind of machine gives the same files, bit for bit, on any
number of MuJoCo's threads.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from metacontroller.data.store import Episodes, TrajectoryStore
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.ant_pinpad.expert import Expert, play
from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.simulator import start_ants
from metacontroller.domains.pinpad.tasks import Task
from metacontroller.errors import UserError
from metacontroller.storage.versions import record

CHUNK = 256
"""Episodes that are played at a time, at most; the episodes of a recipe depend on it."""
MOST_ATTEMPTS = 20
"""Episodes that are played for each one asked for, before the expert is said to fail."""
SECONDS_A_LINE = 10.0
"""Between two lines that tell how far it is."""
NAME = "ant-pinpad"
FORMAT = 2
"""Counts up when the same recipe gives other episodes."""


def versions() -> dict[str, str]:
    """The record of this world (`storage.versions`): every episode depends on MuJoCo, and on Gymnasium's model of the
    ant; nothing if MuJoCo is not installed."""
    found = record(NAME, ("mujoco", "gymnasium"))
    return found if "mujoco" in found else {}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that episodes depend on, but for the version of MuJoCo.

    tasks: one is drawn for each episode. mean_actions: whether the expert's actions are its mean ones. only_successes:
    whether episodes that fail are left out. seed: of all randomness. threads: of MuJoCo; changes nothing.
    """

    arena: Arena
    expert: Expert
    tasks: tuple[Task, ...]
    mean_actions: bool
    only_successes: bool
    seed: int
    threads: int = field(default=0, compare=False)

    def folder(self, episodes: int) -> str:
        """A name that no other recipe or number of episodes has."""
        plain = [FORMAT, asdict(self.arena), self.expert.fingerprint(), self.tasks]
        rest = [self.mean_actions, self.only_successes, self.seed, episodes]
        return hashlib.sha256(json.dumps([*plain, *rest]).encode()).hexdigest()[:16]


def open_dataset(recipe: Recipe, episodes: int, root: Path) -> TrajectoryStore:
    """The store of so many episodes under ``root``, written first if it is not there.

    Its meta holds the record of `versions`, how many episodes were played and how many of those succeeded. Opening one
    that was made with other versions warns.
    """
    path = root / recipe.folder(episodes)
    store = TrajectoryStore.once(path, lambda: write_dataset(recipe, episodes, path))
    store.check_versions(versions())
    return store


def write_dataset(recipe: Recipe, episodes: int, path: Path) -> TrajectoryStore:
    """Plays the episodes and writes them to ``path``."""
    parts, played, solved = _play_enough(recipe, episodes)
    meta = {"versions": versions(), "played": played, "succeeded": solved}
    return TrajectoryStore.join(path, [Episodes.of(part) for part in parts], meta, most=episodes)


def generate(recipe: Recipe, episodes: int) -> Trajectories:
    """So many episodes in memory."""
    parts, _, _ = _play_enough(recipe, episodes)
    held = [episode for part in parts for episode in part.episodes()]
    return Trajectories.from_episodes(held[:episodes])


def _play_enough(recipe: Recipe, episodes: int) -> tuple[list[Trajectories], int, int]:
    """Chunks that together hold at least so many episodes, how many were played, and how many of those succeeded.

    UserError if the expert hardly ever succeeds.
    """
    parts: list[Trajectories] = []
    played = solved = kept = 0
    said = time.monotonic()
    chunk = min(CHUNK, episodes)
    while kept < episodes:
        if played >= MOST_ATTEMPTS * (episodes + CHUNK):
            raise UserError(
                f"the expert solved {solved} of {played} episodes and {episodes} are asked for; train it longer "
                "(examples/ant_expert.py), or set domain.only_successes to false."
            )
        generator = torch.Generator().manual_seed(_chunk_seed(recipe.seed, played))
        drawn = torch.randint(len(recipe.tasks), (chunk,), generator=generator).tolist()
        env = start_ants(recipe.arena, [recipe.tasks[i] for i in drawn], generator, recipe.threads)
        episode = play(env, recipe.expert, None if recipe.mean_actions else generator)
        success = env.success
        played, solved = played + chunk, solved + int(success.sum())
        rows = (success if recipe.only_successes else torch.ones_like(success)).nonzero().squeeze(1)
        if len(rows):
            parts.append(episode.index(rows))
            kept += len(rows)
        if time.monotonic() - said >= SECONDS_A_LINE:
            said = time.monotonic()
            print(f"demonstrations: {min(kept, episodes)}/{episodes}  success {solved / played:.2f}", file=sys.stderr)
    return parts, played, solved


def _chunk_seed(seed: int, played: int) -> int:
    """A seed of the chunk that begins after so many episodes."""
    return int.from_bytes(hashlib.sha256(f"{seed},{played}".encode()).digest()[:7], "big")
