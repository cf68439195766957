"""Where features meet, one trial after the other: a part of `torture.py`.

An environment of the user's that raises and says what it may not, data that change or move between phases, notes that a
kill has cut, reports of folders that hold more than files, a worker with much to say. Each has to end as
docs/reliability.md says.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from metacontroller.storage.run_folder import RunFolder
from torture_faults import Faults, Unwell, stands
from torture_runs import QUIET, differs, finish, left_behind, words

LONG = 1_000_000
"""Characters of an exception with much to say."""

MODULE = f'''
import multiprocessing

import gymnasium
import numpy as np
from gymnasium import spaces

from metacontroller.data import Trajectories

class Odd(gymnasium.Env):
    """A walk of 8 steps that in some episodes raises, or answers what is not of its spaces."""

    observation_space, action_space = spaces.Box(-9, 9, (2,)), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps, self.fault = 0.0, 0, int(self.np_random.integers(12))
        return self.seen(), {{}}

    def step(self, action):
        self.at, self.steps = self.at + int(action) - 1, self.steps + 1
        fault = self.fault if self.steps == 2 else None
        if fault == 0:
            raise RuntimeError("it broke")
        seen = np.full(2, np.nan, np.float32) if fault == 1 else self.seen()
        reward = {{2: None, 3: np.zeros(2)}}.get(fault, float(self.at > 2))
        return seen, reward, self.at > 2, self.steps >= 8, {{}}

    def seen(self):
        return np.array([self.at, self.steps], np.float32)


gymnasium.register("Odd-v0", Odd)


def right(observation, env):
    return 2


def talkative():
    if multiprocessing.parent_process() is not None:
        raise RuntimeError("x" * {LONG})
    batch = [{{"states": np.zeros((4, 2), np.float32), "actions": np.arange(3) % 2}} for _ in range(8)]
    return Trajectories.from_episodes(batch)
'''


class Meetings(Faults):
    """Trials of commands of ``runs``, which have been run undisturbed."""

    def each(self) -> dict[str, Callable[[], str | None]]:
        (self.work / "torture_world.py").write_text(MODULE)
        return {
            "an environment that raises and answers what it may not": self.odd_environment,
            "data that changed between phases": self.changed_data,
            "data that moved": self.moved_data,
            "a torn line among the trusted names": self.torn_note,
            "a run that may only be read is measured": self.read_only,
            "pipes, folders and links where a report looks for pictures": self.odd_pictures,
            "a sweep in the folder of a reproduction": self.other_recipe,
            "a worker's exception of a megabyte": self.long_exception,
        }

    def run(self, *line: Any) -> str:
        """What a command prints, which has to end well."""
        done = finish(words([str(word) for word in line], self.work), self.work, cwd=self.work)
        if done.returncode:
            raise Unwell(f"{line[0]} ended with status {done.returncode}: {done.stderr[-400:]}")
        return done.stdout

    def data(self) -> Path:
        """Episodes of `Odd-v0` that begin well, played once, and a copy of them to spoil."""
        played, copy = self.work / "odd-data", self.work / "odd-copy"
        if not played.exists():
            world = ("--env", "torture_world:Odd-v0", "--policy", "torture_world:right")
            self.run("collect", *world, "--out", played, "--episodes", "64", "--quiet")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(played, copy)
        return copy

    def pretrained(self, name: str) -> tuple[Path, Path]:
        """A run on a copy of the data, and that copy."""
        run, data = self.work / f"odd-{name}", self.data()
        self.run("pretrain", run, "--preset", "offline-debug", "--dataset", data, *QUIET)
        return run, data

    # -- data and environments of the user's --------------------------------------------------------------------------

    def odd_environment(self) -> str | None:
        run = self.work / "odd-run"
        self.run(
            *("pretrain", run, "--preset", "offline-debug", "--dataset", self.data()),
            *("--env", "torture_world:Odd-v0", *QUIET),
        )
        for phase in (["discover"], ["internal-rl"], ["internal-rl", "--raw"]):
            self.run(phase[0], run, *phase[1:], *QUIET)
        lost = [line["lost"] for line in RunFolder(run).read_metrics("internal_rl")]
        return None if 0 < max(lost) < 1 else f"the shares of lost episodes are {lost}"

    def changed_data(self) -> str | None:
        run, data = self.pretrained("changed")
        path = next(path for path in data.rglob("*.npy") if path.name.startswith("states"))
        states = np.load(path)
        states.flat[-1] += 1
        np.save(path, states)
        return stands(finish(words(["discover", "RUN", *QUIET], run), self.work), 2, "odd-copy")

    def moved_data(self) -> str | None:
        run, data = self.pretrained("moved")
        there = data.with_name("odd-elsewhere")
        shutil.rmtree(there, ignore_errors=True)
        data.rename(there)
        done = finish(words(["discover", "RUN", *QUIET], run), self.work)
        wrong = stands(done, 2, "odd-copy")
        if wrong is None:
            self.run("discover", run, "--dataset", there, *QUIET)
        return wrong

    def torn_note(self) -> str | None:
        run, world = self.work / "odd-trusting", ("--env", "torture_world:Odd-v0")
        self.run("pretrain", run, "--preset", "offline-debug", "--dataset", self.data(), *world, *QUIET)
        notes = [path for path in (self.work / "state").rglob("*") if path.is_file()]
        for path in notes:
            with path.open("a") as file:
                file.write('["half a li')
        self.run("discover", run, *QUIET)
        self.run("internal-rl", run, *QUIET)
        return None if notes else "there is no file of names"

    # -- folders that hold more than files ----------------------------------------------------------------------------

    def read_only(self) -> str | None:
        run = self.work / "only-read"
        shutil.copytree(self.runs.folder("internal-rl"), run, dirs_exist_ok=True)
        for path in (*run.rglob("*"), run):
            path.chmod(0o555 if path.is_dir() else 0o444)
        done = self.with_permissions(words(["evaluate", "RUN", "--json", "--episodes", "8"], run))
        for path in (run, *run.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if done.returncode or "success" not in json.loads(done.stdout):
            return f"status {done.returncode}: {done.stderr[-300:]}"
        return None if "kept" in done.stderr else f"it is not said that nothing was kept: {done.stderr[-300:]}"

    def odd_pictures(self) -> str | None:
        run, secret = self.work / "odd-pictures", self.work / "secret.svg"
        shutil.copytree(self.runs.folder("internal-rl"), run, dirs_exist_ok=True)
        figures = run / "figures"
        figures.mkdir(exist_ok=True)
        secret.write_text("<svg>not of this run</svg>")
        os.mkfifo(figures / "pipe.svg")
        (figures / "folder.png").mkdir()
        (figures / "link.svg").symlink_to(secret)
        page = self.work / "odd.html"
        done = finish(words(["report", "RUN", "--out", str(page)], run), self.work, timeout=120)
        if done.returncode == 0 and "not of this run" in page.read_text():
            return "the page holds what lies outside of the folder"
        return None if done.returncode in (0, 2) else f"status {done.returncode}: {done.stderr[-300:]}"

    # -- recipes ------------------------------------------------------------------------------------------------------

    def other_recipe(self) -> str | None:
        run = self.work / "one-recipe"
        self.run("reproduce", "--out", run, "--preset", "debug", *QUIET)
        before = left_behind(run)
        line = ["sweep", "--out", "RUN", "--preset", "debug", "--seeds", "0", "--resume", *QUIET]
        return stands(finish(words(line, run), self.work), 2, "reproduction") or differs(run, before)

    def long_exception(self) -> str | None:
        data = ["--preset", "offline-debug", "--config.domain.dataset", "torture_world:talkative"]
        line = ["reproduce", "--out", "RUN", *data, "--seeds", "0", "1", "--workers", "2", *QUIET]
        done = finish(words(line, self.work / "long"), self.work, timeout=120)
        return None if done.returncode == 2 else f"status {done.returncode}: {done.stderr[-300:]}"
