"""One writer a folder: others are refused while it lives, and not after it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from metacontroller import cli
from metacontroller.errors import UserError
from metacontroller.recipes.jobs import in_processes
from metacontroller.storage.lock import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from metacontroller.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def locked_elsewhere(folder: Path) -> Iterator[int]:
    """Context in which a process, of which this is the number, has locked the folder; it is killed at the end."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process.pid
        finally:
            process.kill()


def refused(folder: Path, process: int) -> None:
    said = rf"{folder} is being written by another process \(process {process} on"
    with pytest.raises(UserError, match=said), locked(folder):
        pass


def test_another_process_is_refused_until_this_one_is_killed(tmp_path: Path) -> None:
    with locked_elsewhere(tmp_path) as process:
        refused(tmp_path, process)
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with locked(tmp_path / ".." / tmp_path.name):  # the same folder
            pass
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_another_process_can_be_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked_elsewhere(tmp_path) as process:
        threading.Timer(0.1, os.kill, (process, signal.SIGKILL)).start()
        with locked(tmp_path, wait=True):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    said = capsys.readouterr().err
    assert said.startswith(f"metacontroller: waiting for process {process} on ")
    assert said.endswith(f", which writes {tmp_path}\n")


def test_a_phase_of_a_locked_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked_elsewhere(tmp_path):
        assert cli.main(["pretrain", str(tmp_path), "--preset", "debug", "--resume", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"metacontroller: {tmp_path} is being written by another process")
    assert said.count("\n") == 1


def note(folder: Path) -> None:
    """In a worker: writes, as its parent, which has locked the folder, has told it to."""
    with locked(folder):
        (folder / "note").touch()


def test_workers_write_for_their_parent(tmp_path: Path) -> None:
    with locked(tmp_path):
        in_processes(note, [(tmp_path,)])
    assert (tmp_path / "note").exists()


def test_a_worker_of_another_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked_elsewhere(tmp_path) as process:
        monkeypatch.setattr("multiprocessing.parent_process", lambda: SimpleNamespace(pid=process + 1))
        refused(tmp_path, process)
        monkeypatch.setattr("multiprocessing.parent_process", lambda: SimpleNamespace(pid=process))
        with locked(tmp_path):
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    script = HOLD.replace("time.sleep(60)", "time.sleep(60 if os.fork() == 0 else 1)\n    os._exit(0)").replace(
        "sys,", "os, sys,"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        assert process.wait() == 0
        with locked(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "outside").exists()
