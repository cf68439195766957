"""One writer a folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metacontroller.errors import UserError
from metacontroller.storage.files import LOCK, fcntl, sweep

_handles: dict[Path, int] = {}
"""The open lock file of each folder that this process has locked."""


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Context in which this process, with the workers that it starts, is the only one to write to the folder.

    It may be entered again within itself. Drafts that killed writers have left are removed. The lock is a file in the
    folder, which names its process and may be there still after a kill. UserError if another process has locked the
    folder, unless it is to be waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, handle = folder.resolve(), None
    if key not in _handles:
        handle = _acquire(folder, wait)
    if handle is None:
        yield
        return
    _handles[key] = handle
    try:
        sweep(folder)
        yield
    finally:
        del _handles[key]
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)


def _acquire(folder: Path, wait: bool) -> int | None:
    """The open and locked file; None where the process that started this one has it, or where there are no locks."""
    if fcntl is None:
        return None
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 256).decode(errors="replace").strip()
            parent = multiprocessing.parent_process()
            if parent is not None and holder == _name(parent.pid):
                os.close(handle)
                return None
            if not wait:
                os.close(handle)
                raise UserError(
                    f"{folder} is being written by another process ({holder or 'just started'}); wait until it ends, "
                    "or choose another folder."
                ) from None
            print(f"metacontroller: waiting for {holder or 'another process'}, which writes {folder}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{_name(os.getpid())}\n".encode(), 0)
            return handle
        os.close(handle)  # its last holder removed it between our opening and our locking


def _name(process: int | None) -> str:
    return f"process {process} on {socket.gethostname()}"


def _forget() -> None:
    """In a forked child: the lock is its parent's, and must not outlive it."""
    for handle in _handles.values():
        os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
