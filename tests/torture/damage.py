"""Thousands of damaged files, and what their readers say: a part of `torture.py`, and a script of its own.

    python tests/torture/damage.py [--files 1000] [--seed 0] [--processes 2] [--only metrics.jsonl] [--trial 123]

A trial damages one file of a sound folder (`damage_kinds`), reads the folder (`damage_readers`) and ends in one of

    named error       a UserError, or the system's own refusal, that names the file
    equal in meaning  accepted, and every value that was read is that of the sound folder
    said unchecked    accepted with another value, where the format holds no checksum and the reader or the docs say so
    in silence        accepted with another value, and nothing was said
    obscure           an error that names no file
    traceback         any other exception, or the end of the process
    hang              no end after `HANG_S` seconds
    code run          the canary is there: code from the file was run
    memory            more than `MEMORY_MB` beyond what the process needed after it had read every sound file

of which the first three are as they should be. Trials run in processes of their own; each limits its address space
(RLIMIT_AS) to what it had after importing everything and reading every sound file, and `MEMORY_MB` more, so that a
reader that asks for more meets a MemoryError whatever it would have touched; peaks of resident memory are told beside.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from damage_kinds import CANARY, Case, damage
from metacontroller.errors import UserError
from metacontroller.storage.system_errors import refusal

HANG_S = 10.0
MEMORY_MB = 1024
GOOD = ("named error", "equal in meaning", "said unchecked")
BAD = ("in silence", "obscure", "traceback", "hang", "code run", "memory")


class Reader(NamedTuple):
    """file: to damage, below the sound folder. read: what the folder means. share: of the trials, in parts.

    unchecked: why a changed value in this file cannot be found, where its format has no place for a checksum: None
    where it has. says: whether the reader then has to say on standard error that it reads unchecked. writes: whether
    reading changes the folder. named: what names the file in an error. swapped: the sound file that may take the place
    of this one, any of its kind unless given: what belongs to no folder can be taken for another of its kind.
    """

    file: str
    read: Callable[[Path], str]
    share: int = 12
    unchecked: str | None = None
    says: bool = False
    writes: str | None = None
    named: tuple[str, ...] = ()
    swapped: str | None = None


class Found(NamedTuple):
    """What a trial came to, and a line about it."""

    trial: int
    reader: str
    kind: str
    outcome: str
    said: str


class Findings:
    """What has been found: outcomes by reader, the trials that failed, and the most memory taken beyond the start."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.kinds: Counter[str] = Counter()
        self.failures: list[Found] = []
        self.peak_mb = 0.0

    def add(self, found: Found) -> None:
        self.counts.setdefault(found.reader, Counter())[found.outcome] += 1
        self.kinds[found.kind] += 1
        if found.outcome in BAD:
            self.failures.append(found)
            print(
                f"FAILED trial {found.trial}, {found.reader}, {found.kind}: {found.outcome}: {found.said}", flush=True
            )

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


def all_readers() -> dict[str, Reader]:
    """By name; they import all of the library."""
    from damage_readers import READERS

    return READERS


# -- one trial --------------------------------------------------------------------------------------------------------


def reader_of(trial: int, seed: int, readers: dict[str, Reader]) -> tuple[str, random.Random]:
    """The reader of a trial, and what draws the damage."""
    chance = random.Random(f"{seed}-{trial}")
    return chance.choices(list(readers), [reader.share for reader in readers.values()])[0], chance


def attempt(trial: int, seed: int, work: Path, readers: dict[str, Reader], meanings: dict[str, str]) -> Found:
    """Damages a file below ``work``/damaged, reads, and puts the sound one back."""
    name, chance = reader_of(trial, seed, readers)
    reader, origin, folder = readers[name], work / "sound", work / "damaged"
    path, content = folder / reader.file, (origin / reader.file).read_bytes()
    alike = sorted(other.file for other in readers.values() if Path(other.file).suffix == path.suffix)
    other = (origin / (chance.choice(alike) if reader.swapped is None else reader.swapped)).read_bytes()
    kind = damage(Case(path, content, other, chance))
    outcome, said = _read(reader, folder, path, meanings[name])
    if Path(os.environ[CANARY]).exists():
        shutil.rmtree(os.environ[CANARY])
        outcome = "code run"
    if not reader.writes:
        _put_back(path, content)
    else:
        shutil.rmtree(folder / reader.writes)
        shutil.copytree(origin / reader.writes, folder / reader.writes)
    return Found(trial, name, kind, outcome, " ".join(said.split())[:300])


def _read(reader: Reader, folder: Path, path: Path, expected: str) -> tuple[str, str]:
    """The outcome of reading, and what the reader said."""
    _forget_warnings()
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            found = reader.read(folder)
    except Exception as error:
        text = str(error)
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            return "memory", repr(error)
        if not isinstance(error, UserError) and (not isinstance(error, OSError) or refusal(error) is None):
            return "traceback", repr(error)
        named = any(name in text for name in (path.name, str(path.parent), *reader.named))
        return ("named error" if named else "obscure"), text
    if found == expected:
        return "equal in meaning", ""
    fair = reader.unchecked is not None and ("unchecked" in told.getvalue() or not reader.says)
    return ("said unchecked" if fair else "in silence"), told.getvalue() or "nothing"


def _forget_warnings() -> None:
    """What is said once a process has to be said in every trial."""
    from metacontroller.data import store
    from metacontroller.storage import manifest

    manifest._warned.clear()
    store._said.clear()


def _put_back(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# -- processes --------------------------------------------------------------------------------------------------------


def work_off(sender: Connection, work: Path, seed: int, trials: list[int]) -> None:
    """In a process of its own: sends the number of each trial before it is made, then what it came to, and the peak of
    resident memory in the end."""
    readers = all_readers()
    folder = work / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "sound", folder)
    sys.path.insert(0, str(folder))  # where the canary's module is
    meanings = {}
    for name, reader in readers.items():
        with contextlib.redirect_stderr(None):
            meanings[name] = reader.read(folder)
        if reader.writes:
            shutil.rmtree(folder / reader.writes)
            shutil.copytree(work / "sound" / reader.writes, folder / reader.writes)
    gc.collect()
    space, before = _status_kb("VmSize"), _status_kb("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, ((space + MEMORY_MB * 1024) * 1024, resource.RLIM_INFINITY))
    for trial in trials:
        sender.send(trial)
        sender.send(attempt(trial, seed, work, readers, meanings))
    sender.send((_status_kb("VmHWM") - before) / 1024)


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Process:
    """A process that works trials off, and is started again after one that it did not survive."""

    def __init__(self, work: Path, seed: int, trials: list[int], start: Callable[..., Any]) -> None:
        self.work, self.seed, self.left, self.start_process = work, seed, trials, start
        self.slow: set[int] = set()  # trials that had no end in time once; on a busy machine that may be chance
        self.start()

    def start(self) -> None:
        self.receiver, sender = multiprocessing.Pipe(duplex=False)
        self.process = self.start_process(sender, self.work, self.seed, self.left)
        sender.close()
        self.trial: int | None = None
        self.since = time.monotonic()

    def ask(self, findings: Findings, readers: dict[str, Reader]) -> None:
        """Takes what has come, and starts anew where the process has died or hangs."""
        failure = None
        try:
            while self.receiver.poll(0.02):
                message = self.receiver.recv()
                self.since = time.monotonic()
                if isinstance(message, Found):
                    findings.add(message)
                    self.left = [trial for trial in self.left if trial != message.trial]
                elif isinstance(message, float):
                    findings.peak_mb = max(findings.peak_mb, message)
                else:
                    self.trial = message
        except EOFError:
            self.process.join()
            if not self.left:
                return
            failure = ("traceback", f"the process ended with status {self.process.exitcode}")
        if self.trial is not None and time.monotonic() - self.since > HANG_S:
            failure = ("hang", f"no end after {HANG_S} s, twice")
        if failure is None:
            return
        self.stop()
        if self.trial is None:
            sys.exit(f"a process did not begin: {failure[1]}")
        if failure[0] == "hang" and self.trial not in self.slow:
            self.slow.add(self.trial)
            self.start()
            return
        findings.add(Found(self.trial, reader_of(self.trial, self.seed, readers)[0], "?", *failure))
        self.left = [trial for trial in self.left if trial != self.trial]
        self.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.receiver.close()


def _start(sender: Connection, work: Path, seed: int, trials: list[int]) -> Any:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work_off, args=(sender, work, seed, trials), daemon=True)
    process.start()
    return process


def damaged_files(
    work: Path, trials: list[int], seed: int, *, processes: int = 2, deadline: float = float("inf")
) -> Findings:
    """Makes the trials of these numbers below ``work``, until ``deadline`` (of time.monotonic)."""
    os.environ[CANARY] = str(work / "canary")
    os.environ["XDG_STATE_HOME"] = str(work / "state")
    from damage_readers import sound

    sound(work / "sound-0")
    findings, readers = Findings(), all_readers()
    running = []
    for rank in range(processes):
        own = work / f"process-{rank}"
        own.mkdir()
        shutil.copytree(work / "sound-0", own / "sound")
        running.append(Process(own, seed, trials[rank::processes], _start))
    while any(process.left for process in running) and time.monotonic() < deadline:
        for process in running:
            if process.left or process.process.is_alive():
                process.ask(findings, readers)
    for process in running:
        process.process.join(2.0)
        process.ask(findings, readers)
        process.stop()
    return findings


def table(findings: Findings) -> list[str]:
    """Lines of Markdown, by reader."""
    lines = [f"| file | {' | '.join((*GOOD, *BAD))} |", "|---|" + "---|" * len((*GOOD, *BAD))]
    for name, found in [*sorted(findings.counts.items()), ("all", sum(findings.counts.values(), Counter()))]:
        lines.append(f"| {name} | {' | '.join(str(found[outcome]) for outcome in (*GOOD, *BAD))} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default=None, help="trials of this reader alone")
    parser.add_argument("--trial", type=int, default=None, help="one trial, as a failure names it")
    options = parser.parse_args()
    trials = list(range(options.files)) if options.trial is None else [options.trial]
    if options.only is not None:
        trials = [n for n in trials if reader_of(n, options.seed, all_readers())[0] == options.only]
    with tempfile.TemporaryDirectory(prefix="damage-") as name:
        findings = damaged_files(Path(name), trials, options.seed, processes=min(options.processes, len(trials)))
    print("\n".join(table(findings)))
    print(f"{findings.total} files; peak {findings.peak_mb:.0f} MB beyond the start; kinds {dict(findings.kinds)}")
    return int(bool(findings.failures))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
