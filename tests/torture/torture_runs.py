"""Commands that are killed and told to stop at random instants, and resumed: a part of `torture.py`.

Every command is run once undisturbed. A trial starts it on a copy of what it started from, ends it after a random part
of that time, goes on with the command line that it named, and compares all that is left: tensors and arrays bit by bit,
metrics line by line, results number by number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load_file

from metacontroller.storage.run_folder import RunFolder

FAREWELL_S = 5.0
"""Within which a signal has to end a command."""

QUIET = ["--quiet", "--device", "cpu"]
SMALL_STUDY = {"few": ["seeds 0"], "probe": ["steps 5", "episodes 32"], "steer": ["episodes 32"]}
SMALL_STUDY |= {"inject": ["walks 16"], "gate": ["episodes 32"], "oracle": ["episodes 32"]}
STUDY = [word for part, ends in SMALL_STUDY.items() for end in ends for word in f"--study.{part}-{end}".split()]
COLLECT = ["--env", "CartPole-v1", "--policy", "torture_policy:act", "--episodes", "1000", "--workers", "2"]
POLICY = "def act(observation, env):\n    return int(observation[2] > 0)\n"


class Command(NamedTuple):
    """words: RUN stands for the folder. after: whose result it starts from. share: of the trials, in parts."""

    words: list[str]
    after: str | None
    share: int


COMMANDS = {
    "pretrain": Command(["pretrain", "RUN", "--preset", "debug", *QUIET], None, 4),
    "discover": Command(["discover", "RUN", *QUIET], "pretrain", 4),
    "internal-rl": Command(["internal-rl", "RUN", *QUIET], "discover", 4),
    "internal-rl --raw": Command(["internal-rl", "RUN", "--raw", *QUIET], "discover", 4),
    "evolve": Command(["evolve", "RUN", "--evolution.generations", "16", *QUIET], "discover", 3),
    "evaluate": Command(["evaluate", "RUN", "--episodes", "256", "--json", "--device", "cpu"], "internal-rl", 2),
    "collect": Command(["collect", "--out", "RUN", *COLLECT, "--quiet"], None, 3),
    "sweep": Command(["sweep", "--out", "RUN", "--preset", "debug", "--seeds", "0", "1", *QUIET], None, 3),
    "reproduce": Command(["reproduce", "--out", "RUN", "--preset", "debug", *QUIET], None, 2),
    "figures": Command(["figures", "--out", "RUN", "--preset", "debug", "--seeds", "0", *STUDY, *QUIET], None, 1),
}


def environment(work: Path) -> dict[str, str]:
    """Of the commands: the policy of `collect` is found, one thread each, and notes stay below ``work``."""
    path = os.pathsep.join([str(work), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(work / "state")}


def words(command: list[str], run: Path) -> list[str]:
    """The command line in this Python."""
    named = [str(run) if word == "RUN" else word for word in command]
    return [sys.executable, "-m", "metacontroller.cli", *named]


def finish(line: list[str], work: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command line to its end."""
    options = {"env": environment(work), "capture_output": True, "text": True, "timeout": 900, **options}
    return subprocess.run(line, **options)


# -- what is left -----------------------------------------------------------------------------------------------------

COSTS = {"seconds", "phase_seconds", "peak_rss_mb", "machine", "run"}
"""What results say of time, memory and the folder's name, which differ between any two runs."""


def left_behind(run: Path) -> dict[str, str]:
    """All that a folder holds and that does not depend on time, by the file's name."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.name.startswith(".") or path.name == "manifest.json" or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            parts = [f"{key} {value.dtype} {list(value.shape)} {_digest(value)}" for key, value in tensors.items()]
            found[name] = "\n".join(sorted(parts))
        elif path.suffix == ".npy":
            found[name.split("-")[0]] = _digest(np.load(path))  # a store that replaces another counts its files
        elif path.name == "metrics.jsonl":
            lines = RunFolder(path.parent).read_metrics()  # phases that run side by side share the file
            found[name] = "\n".join(map(str, sorted(lines, key=lambda line: line["phase"])))
        elif path.suffix == ".json":
            found[name] = str(_without_costs(json.loads(path.read_text()), name))
        elif path.name == "error.txt":
            found[name] = path.read_text()
    return found


def _digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _without_costs(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        left_out = COSTS | ({"sealed", "files"} if name == "store.json" else set())
        return {key: _without_costs(entry, "") for key, entry in value.items() if key not in left_out}
    return [_without_costs(entry, "") for entry in value] if isinstance(value, list) else value


def differs(run: Path, expected: dict[str, str]) -> str | None:
    """The first thing in which a run is not the one expected, in words."""
    try:
        found = left_behind(run)
    except Exception as error:
        return f"cannot be read: {error}"
    if found.keys() != expected.keys():
        return f"holds other files: {sorted(found.keys() ^ expected.keys())}"
    return next((f"{name} differs" for name, value in expected.items() if found[name] != value), None)


# -- trials -----------------------------------------------------------------------------------------------------------


class Runs:
    """Trials below ``work``. seconds: of each command; expected: what each leaves."""

    def __init__(self, work: Path, commands: list[str]) -> None:
        self.work, self.names = work, commands
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, str]] = {}
        work.joinpath("torture_policy.py").write_text(POLICY)

    def undisturbed(self, also: tuple[str, ...] = ()) -> None:
        """Runs every command, and those of ``also``, on a copy of what it starts from; exits if one fails by itself."""
        for name in _with_origins([*self.names, *also]):
            run, start = self.folder(name), time.monotonic()
            self.origin(name, run)
            done = finish(words(COMMANDS[name].words, run), self.work)
            self.seconds[name] = time.monotonic() - start
            if done.returncode:
                sys.exit(f"{name} ends with status {done.returncode} when it is left alone: {done.stderr[-500:]}")
            self.expected[name] = left_behind(run)

    def folder(self, name: str) -> Path:
        """What a command left when it was undisturbed."""
        return self.work / "undisturbed" / name.replace(" ", "")

    def origin(self, name: str, run: Path) -> Path:
        """Makes ``run`` what a command starts from; returns it."""
        before = COMMANDS[name].after
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        if before is not None:
            shutil.copytree(self.folder(before), run)
        return run

    def trial(self, number: int, name: str, by: signal.Signals, seed: int) -> str | None:
        """Ends a command at a random instant, resumes it and compares; what is wrong, or None."""
        chance = random.Random(f"{seed}-{number}")
        run = self.origin(name, self.work / f"trial-{number}")
        line = words(COMMANDS[name].words, run)
        process = subprocess.Popen(
            line,
            env=environment(self.work),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.0, self.seconds[name]))
        to_all = by == signal.SIGINT and chance.random() < 0.5  # as a terminal's Ctrl-C
        start = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_all else os.kill)(process.pid, by)
        _, said = process.communicate()
        took = time.monotonic() - start
        failure, onwards = ending(by, process.returncode, said, took)
        failure = failure or self._resumed(name, run, onwards)
        if failure is None:
            shutil.rmtree(run)
        return failure and f"{failure} ({run.name})"

    def _resumed(self, name: str, run: Path, onwards: list[str] | None) -> str | None:
        """Goes on with the words that a farewell named, or with those of the command and --resume."""
        resumable = name not in ("evaluate", "figures")
        line = onwards or [*words(COMMANDS[name].words, run), *(["--resume"] if resumable else [])]
        done = finish(line, self.work)
        if done.returncode:
            return f"resumed with status {done.returncode}: {done.stderr[-300:]}"
        return differs(run, self.expected[name])


def _with_origins(names: list[str]) -> list[str]:
    """The commands with those whose results they start from, in an order in which they can be run."""
    needed: dict[str, None] = {}
    for name in names:
        chain = [name]
        while (before := COMMANDS[chain[0]].after) is not None:
            chain.insert(0, before)
        needed |= dict.fromkeys(chain)
    return list(needed)


def ending(by: signal.Signals, status: int, said: str, took: float) -> tuple[str | None, list[str] | None]:
    """What is wrong with how a command ended, or None; and the command line that it named to go on with.

    Before the program runs and after it is done the signal is Python's: it has nothing to say then.
    """
    if status == 0 or by == signal.SIGKILL or (status == -by and not said):
        return None, None
    lines = [line for line in said.splitlines() if line.strip()]
    farewells = [line for line in lines if f"stopped by {by.name}; go on with: metacontroller " in line]
    if status != 128 + by or len(farewells) != 1 or lines != farewells:
        return f"status {status} and {len(farewells)} lines that name what resumes: {said[-300:]}", None
    if took > FAREWELL_S:
        return f"took {took:.1f} s to stop", None
    onwards = shlex.split(farewells[0].partition("go on with: metacontroller ")[2])
    return None, [sys.executable, "-m", "metacontroller.cli", *onwards]


def schedule(kills: int, signals: int, names: list[str], seed: int) -> list[tuple[str, signal.Signals]]:
    """Which command meets which signal: each gets its share of both kinds, and one at least."""
    chance, trials = random.Random(f"{seed}-schedule"), []
    for count, kinds in ((kills, [signal.SIGKILL]), (signals, [signal.SIGTERM, signal.SIGINT])):
        deck = list(names)
        while len(deck) < count:
            deck += chance.choices(names, [COMMANDS[name].share for name in names])
        trials += [(name, kinds[index % len(kinds)]) for index, name in enumerate(deck[:count])]
    return trials
