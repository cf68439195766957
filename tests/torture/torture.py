"""What does a run survive? `make torture` kills, signals, starves and damages runs of the preset debug.

Commands are killed and signalled at random instants and resumed; what they leave must be that of a command that was
left alone, bit by bit (`torture_runs`). Then every fault of the system (`torture_faults`), features that meet
(`torture_meetings`), and files that are damaged at random (`damage`): each has to meet an error that names it, or to
mean what it meant. Prints each trial that fails as it does, and one page of tables at the end, which --out writes too.
Exits with status 1 if anything failed.

    python tests/torture/torture.py [--kills 100] [--signals 40] [--files 10000] [--minutes 30] [--seed 0] [--out PAGE]

With --minutes, trials that were not begun in time are left out, and the page says how many were made. A failure is made
again by the same --seed; one of a damaged file alone by `python tests/torture/damage.py --seed SEED --trial NUMBER`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from damage import MEMORY_MB, Findings, damaged_files
from damage import table as table_of_files
from torture_faults import NEEDED, Faults, faults
from torture_meetings import Meetings
from torture_runs import COMMANDS, FAREWELL_S, Runs, schedule

AT_ONCE = 2
"""Trials at the same time."""


class Tally:
    """Trials of kills and signals: how many were made and what failed, by command and signal."""

    def __init__(self, runs: Runs, seed: int) -> None:
        self.runs, self.seed = runs, seed
        self.made: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []

    def run(self, trials: list[tuple[str, signal.Signals]], deadline: float) -> None:
        """Makes trials side by side, those that can begin before the deadline."""

        def one(number: int) -> None:
            name, by = trials[number]
            if time.monotonic() > deadline:
                return
            failure = self.runs.trial(number, name, by, self.seed)
            self.made[name, kind_of(by)] += 1
            if failure is not None:
                self.failures.append(f"{by.name} during {name}: {failure}")
                print(f"FAILED {self.failures[-1]}", flush=True)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(len(trials))))

    def table(self) -> list[str]:
        """Lines of Markdown."""
        failed = Counter(failure.partition(" during ")[2].partition(":")[0] for failure in self.failures)
        lines = ["| command | seconds alone | kills | signals | failed |", "|---|---|---|---|---|"]
        for name in self.runs.names:
            counts = [self.made[name, kind] for kind in ("kill", "signal")]
            lines.append(f"| {name} | {self.runs.seconds[name]:.1f} | {counts[0]} | {counts[1]} | {failed[name]} |")
        total = [
            sum(count for (_, kind), count in self.made.items() if kind == wanted) for wanted in ("kill", "signal")
        ]
        return [*lines, f"| all | | {total[0]} | {total[1]} | {len(self.failures)} |"]


def kind_of(by: signal.Signals) -> str:
    """Whether a command is killed, or told to stop."""
    return "kill" if by == signal.SIGKILL else "signal"


def page(tally: Tally, refused: dict[str, str | None], files: Findings, minutes: float, command: str) -> str:
    """All results as a page."""
    lines = ["# What runs survive", "", f"`{command}`, {minutes:.1f} minutes on {machine()}.", ""]
    lines += [
        "Commands of the preset debug, killed (SIGKILL) or told to stop (SIGTERM, SIGINT) at a random instant, and "
        "resumed. Failed: anything of what is left, tensor, array, metric or result, is not that of the command left "
        f"alone; or a signal did not end it with status 143 or 130, within {FAREWELL_S:.0f} s, with one line that "
        "names the command which resumes (that line is what resumed it).",
        "",
        *tally.table(),
        "",
        "Faults of the system: the exit status, one line of error, and that the command then goes on to the same end; "
        "and features that meet: an error that names it, or an end as the documentation says.",
        "",
        "| fault | result |",
        "|---|---|",
        *(f"| {name} | {told(failure)} |" for name, failure in refused.items()),
        "",
        f"{files.total} damaged files, by what read them; good are the first three columns. Said unchecked: values "
        "changed where the format has no place for a checksum, and the reader or the documentation says so (folders "
        "without a manifest and stores of format 1, as older releases wrote them; Minari).",
        "",
        *table_of_files(files),
        "",
        f"Address space was limited to {MEMORY_MB} MB beyond what a process had after reading every sound file; at "
        f"most {files.peak_mb:.0f} MB of it were resident. Kinds of damage: "
        + ", ".join(f"{name} {count}" for name, count in sorted(files.kinds.items()))
        + ".",
        "",
    ]
    failures = [*tally.failures, *(f"{name}: {text}" for name, text in refused.items() if is_failure(text))]
    failures += [f"file {one.trial}, {one.reader}, {one.kind}: {one.outcome}: {one.said}" for one in files.failures]
    if failures:
        lines += ["Failures:", "", *(f"- {' '.join(failure.split())[:400]}" for failure in failures), ""]
    return "\n".join(lines)


def is_failure(text: str | None) -> bool:
    """Whether a fault's result is one."""
    return text is not None and not text.startswith("left out")


def told(text: str | None) -> str:
    """A fault's result in a cell of the table."""
    return "ok" if text is None else "FAILED" if is_failure(text) else text.replace("|", "/")


def machine() -> str:
    """What the page was made on."""
    return f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signals", type=int, default=40)
    parser.add_argument("--files", type=int, default=10_000, help="damaged files, over all readers")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no further trial begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), metavar="NAME")
    parser.add_argument("--skip-faults", action="store_true", help="leave the faults of the system out")
    parser.add_argument("--out", type=Path, default=None, help="write the page there")
    options = parser.parse_args()
    began = time.monotonic()
    deadline = began + 60 * options.minutes
    work = Path(tempfile.mkdtemp(prefix="torture-"))
    runs = Runs(work, options.commands)
    tally = Tally(runs, options.seed)
    if options.kills + options.signals or not options.skip_faults:
        runs.undisturbed(also=() if options.skip_faults else NEEDED)
    refused = {} if options.skip_faults else faults({**Faults(runs).each(), **Meetings(runs).each()}, deadline)
    (work / "files").mkdir()
    third = time.monotonic() + max(0.0, deadline - time.monotonic()) / 3
    files = damaged_files(work / "files", list(range(options.files)), options.seed, processes=AT_ONCE, deadline=third)
    tally.run(schedule(options.kills, options.signals, options.commands, options.seed), deadline)
    command = shlex.join(["python", "tests/torture/torture.py", *sys.argv[1:]])
    text = page(tally, refused, files, (time.monotonic() - began) / 60, command)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    print(text)
    failed = bool(tally.failures or files.failures or any(map(is_failure, refused.values())))
    print(f"what failed is kept in {work}" if failed else "nothing failed", flush=True)
    if not failed:
        shutil.rmtree(work)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
