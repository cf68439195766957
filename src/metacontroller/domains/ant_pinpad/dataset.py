"""The expert's demonstrations as a recipe: `open_dataset` keeps them on disk.

The same recipe with the same version of MuJoCo on the same kind of machine gives the same files, bit for bit, on any
number of MuJoCo's threads.
"""

from __future__ import annotations

import hashlib
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.ant_pinpad.expert import Expert, play
from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.simulator import start_ants
from metacontroller.domains.pinpad import worlds
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
    installed = record(NAME, ("mujoco", "gymnasium"))
    return installed if "mujoco" in installed else {}


@dataclass(frozen=True, kw_only=True)
class Recipe(worlds.Recipe):
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

    def facts(self) -> list[Any]:
        content = [FORMAT, asdict(self.arena), self.expert.fingerprint(), self.tasks]
        return [*content, self.mean_actions, self.only_successes, self.seed]

    def make(self, episodes: int) -> tuple[list[Trajectories], dict[str, Any]]:
        """Chunks that together hold at least so many episodes, and how many were played and succeeded.

        UserError if the expert hardly ever succeeds.
        """
        chunks: list[Trajectories] = []
        played = solved = made = 0
        last_line = time.monotonic()
        while made < episodes:
            if played >= MOST_ATTEMPTS * (episodes + CHUNK):
                raise UserError(
                    f"the expert solved {solved} of {played} episodes and {episodes} are asked for; train it longer "
                    "(examples/ant_expert.py), or set domain.only_successes to false."
                )
            chunk, success = self._play(min(CHUNK, episodes), played)
            played, solved = played + len(success), solved + int(success.sum())
            rows = (success if self.only_successes else torch.ones_like(success)).nonzero().squeeze(1)
            if len(rows):
                chunks.append(chunk.index(rows))
                made += len(rows)
            if time.monotonic() - last_line >= SECONDS_A_LINE:
                last_line = time.monotonic()
                share = solved / played
                print(f"demonstrations: {min(made, episodes)}/{episodes}  success {share:.2f}", file=sys.stderr)
        return chunks, {"played": played, "succeeded": solved}

    def _play(self, count: int, played: int) -> tuple[Trajectories, torch.Tensor]:
        """So many episodes, after as many were played, and which of them succeeded."""
        seed = hashlib.sha256(f"{self.seed},{played}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        drawn = torch.randint(len(self.tasks), (count,), generator=generator).tolist()
        env = start_ants(self.arena, [self.tasks[number] for number in drawn], generator, self.threads)
        return play(env, self.expert, None if self.mean_actions else generator), env.success


def generate(recipe: Recipe, episodes: int) -> Trajectories:
    """So many episodes in memory."""
    chunks, _ = recipe.make(episodes)
    made = [episode for chunk in chunks for episode in chunk.episodes()]
    return Trajectories.from_episodes(made[:episodes])
