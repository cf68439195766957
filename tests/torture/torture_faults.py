"""What the system refuses, one fault after the other: a part of `torture.py`.

Each has to end a command with the status that docs/reliability.md names and with one line on standard error; where
there is something to go on with, the command then goes on and leaves what an undisturbed one leaves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from metacontroller.storage.run_folder import RunFolder
from torture_runs import COMMANDS, Runs, differs, environment, finish, words

DISCOVER = COMMANDS["discover"].words
NEEDED = ("discover", "internal-rl")
"""Commands that have to have been run undisturbed."""


class LeftOut(Exception):
    """Why a fault cannot be made on this machine."""


class Unwell(Exception):
    """What is wrong with a command that had to end well."""


class Faults:
    """Of commands of ``runs``, which have been run undisturbed."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.work = runs, runs.work

    def each(self) -> dict[str, Callable[[], str | None]]:
        """The faults by name; each returns what is wrong, or None. `LeftOut` where it cannot be made here."""
        return {
            "disk full: a tmpfs with 20 kB left": self.full_tmpfs,
            "disk full: a limit on a file's size": self.file_limit,
            "disk full: output to /dev/full": self.full_output,
            "no permission": self.no_permission,
            "a folder that is read-only": self.closed_folder,
            "a file where the folder should be": self.file_in_the_way,
            "a folder where a checkpoint should be": self.folder_in_the_way,
            "a path that is too long": self.long_path,
            "a path that is not UTF-8": self.odd_path,
            "a config that is not UTF-8": self.odd_config,
            "a pipe that nobody reads": self.broken_pipe,
            "no GPU": self.no_gpu,
            "a second writer": self.second_writer,
            "two commands begun at once": self.two_at_once,
            "too few open files": self.few_files,
        }

    # -- what is expected ---------------------------------------------------------------------------------------------

    def start(self, name: str) -> Path:
        """A folder from which `discover` can start."""
        return self.runs.origin("discover", self.work / f"fault-{name}")

    def goes_on(self, run: Path) -> str | None:
        done = finish([*words(DISCOVER, run), "--resume"], self.work)
        if done.returncode:
            return f"went on with status {done.returncode}: {done.stderr[-300:]}"
        return differs(run, self.runs.expected["discover"])

    # -- space --------------------------------------------------------------------------------------------------------

    def full_tmpfs(self) -> str | None:
        run, mount = self.start("tmpfs"), self.work / "tmpfs"
        mount.mkdir()
        own = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
        script = """
            mount -t tmpfs -o size=16m tmpfs "$1" && cp -r "$2/." "$1/" || exit 77
            used=$(df --output=used -B1024 "$1" | tail -1)
            mount -o remount,size=$((used + 20))k "$1" || exit 77
            shift 2; "$@"; status=$?
            mount -o remount,size=16m "$MOUNT" && rm -r "$RUN" && cp -r "$MOUNT" "$RUN" && exit $status
        """
        line = [*own, "bash", "-c", script, "bash", str(mount), str(run), *words(DISCOVER, mount)]
        done = finish(line, self.work, env={**environment(self.work), "MOUNT": str(mount), "RUN": str(run)})
        if done.returncode in (1, 77) and "tmpfs" in done.stderr + "tmpfs" * ("unshare" in done.stderr):
            raise LeftOut(f"mounting is not allowed here ({done.stderr.strip()[-80:]})")
        return stands(done, 4, "no space is left") or self.goes_on(run)

    def file_limit(self) -> str | None:
        run = self.start("limit")
        line = ["bash", "-c", 'ulimit -f 16 && exec "$@"', "bash", *words(DISCOVER, run)]
        return stands(finish(line, self.work), 4, "no space is left") or self.goes_on(run)

    def full_output(self) -> str | None:
        if not Path("/dev/full").exists():
            raise LeftOut("there is no /dev/full")
        line = words(["evaluate", "RUN", "--json", "--episodes", "4"], self.runs.folder("internal-rl"))
        with open("/dev/full", "w") as full:
            done = finish(line, self.work, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        return stands(done, 4, "no space is left")

    # -- permissions --------------------------------------------------------------------------------------------------

    def no_permission(self) -> str | None:
        run = self.start("closed")
        (run / "base_model.safetensors").chmod(0)
        failure = stands(self.with_permissions(words(DISCOVER, run)), 5, "Permission denied")
        (run / "base_model.safetensors").chmod(0o644)
        return failure or self.goes_on(run)

    def closed_folder(self) -> str | None:
        run = self.start("read-only")
        for path in (*run.rglob("*"), run):
            path.chmod(0o555 if path.is_dir() else 0o444)
        failure = stands(self.with_permissions(words(DISCOVER, run)), 5, "Permission denied")
        for path in (run, *run.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return failure or self.goes_on(run)

    def with_permissions(self, line: list[str]) -> subprocess.CompletedProcess[str]:
        """Runs a command line; where this is root, whom nothing is refused, without root's capabilities."""
        if os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                raise LeftOut("root ignores permissions, and there is no setpriv to give them up")
            own = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
            probe = finish([*own, "true"], self.work)
            if probe.returncode:
                raise LeftOut(f"root ignores permissions and cannot give them up ({probe.stderr.strip()[-80:]})")
            line = [*own, *line]
        return finish(line, self.work)

    # -- in the way ---------------------------------------------------------------------------------------------------

    def file_in_the_way(self) -> str | None:
        path = self.work / "a file"
        path.write_text("mine")
        done = finish(words(COMMANDS["pretrain"].words, path), self.work)
        return stands(done, 5, "in the way") or (None if path.read_text() == "mine" else "the file is gone")

    def folder_in_the_way(self) -> str | None:
        run = self.start("way")
        (run / "meta_controller.safetensors").mkdir()
        failure = stands(finish(words(DISCOVER, run), self.work), 5, "in the way")
        (run / "meta_controller.safetensors").rmdir()
        return failure or self.goes_on(run)

    def long_path(self) -> str | None:
        done = finish(words(COMMANDS["pretrain"].words, self.work / ("long" * 100)), self.work)
        return stands(done, 5, "shorter path")

    def odd_path(self) -> str | None:
        path = Path(os.fsdecode(os.fsencode(self.work) + b"/odd-\xff"))
        shutil.rmtree(path, ignore_errors=True)
        done = finish(words(COMMANDS["pretrain"].words, path), self.work, errors="replace")
        return stands(done, 2, "UTF-8") or ("the folder was made" if path.exists() else None)

    def odd_config(self) -> str | None:
        run = self.start("utf8")
        (run / "config.json").write_bytes(b'{"domain": "\xff"}')
        return stands(finish(words(DISCOVER, run), self.work), 2, "config.json")

    # -- the rest -----------------------------------------------------------------------------------------------------

    def broken_pipe(self) -> str | None:
        line = words(["evaluate", "RUN", "--json", "--episodes", "4"], self.runs.folder("internal-rl"))
        reading, writing = os.pipe()
        os.close(reading)
        done = finish(line, self.work, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        return stands(done, 141, "what read the output has ended")

    def no_gpu(self) -> str | None:
        if torch.cuda.is_available():
            raise LeftOut("there is a GPU here")
        run = self.start("gpu")
        done = finish(words([*DISCOVER[:-1], "cuda"], run), self.work)
        return stands(done, 2, "PyTorch finds no GPU here") or self.goes_on(run)

    def second_writer(self) -> str | None:
        run = self.start("shared")
        with RunFolder(run).locked():
            done = finish(words(DISCOVER, run), self.work)
        return stands(done, 2, "is being written by another process") or self.goes_on(run)

    def two_at_once(self) -> str | None:
        run, environ = self.start("race"), environment(self.work)
        both = [
            subprocess.Popen(words(DISCOVER, run), env=environ, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]
        said = [process.communicate()[1] for process in both]
        statuses = sorted(process.returncode for process in both)
        if statuses != [0, 2]:
            return f"statuses {statuses}: {said}"
        return differs(run, self.runs.expected["discover"])

    def few_files(self) -> str | None:
        run = self.start("files")
        line = ["bash", "-c", 'ulimit -n 6 && exec "$@"', "bash", *words(DISCOVER, run)]
        done = finish(line, self.work)
        if done.returncode == 0:
            return differs(run, self.runs.expected["discover"])
        return stands(done, 5, "open") or self.goes_on(run)


def stands(done: subprocess.CompletedProcess[str], status: int, sentence: str) -> str | None:
    """What is wrong with how a command ended: its status, or anything but one line with ``sentence``."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode != status or len(lines) != 1 or sentence not in done.stderr:
        return f"status {done.returncode}, expected {status} and one line with {sentence!r}: {done.stderr[-400:]}"
    return None


def faults(trials: dict[str, Callable[[], str | None]], deadline: float) -> dict[str, str | None]:
    """What is wrong with each fault, None where nothing is; a text that begins with "left out" says why it was not."""
    found: dict[str, str | None] = {}
    for name, fault in trials.items():
        if time.monotonic() > deadline:
            found[name] = "left out: no time"
            continue
        try:
            found[name] = fault()
        except LeftOut as reason:
            found[name] = f"left out: {reason}"
        except (Unwell, subprocess.TimeoutExpired) as wrong:
            found[name] = str(wrong)[:1000]
        print(f"{name}: {found[name] or 'ok'}", flush=True)
    return found
