"""Drafts: files that are written beside their place, and moved there once they are whole.

Each stands in a folder of its own, ``.metacontroller-RANDOM.tmp``, which nobody can have put there before, and which is
locked while its writer lives: what a killed one has left is known by that, and removed.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

PREFIX, SUFFIX = ".metacontroller-", ".tmp"
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Yields a new, empty file beside ``path``, to fill and to move there; removed at the end unless moved.

    Its name has no ending, so that nobody who looks for files takes it for one that is whole. What writes it may
    replace it, as safetensors does.
    """
    with draft_folder(path) as folder:
        draft = folder / "draft"
        os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666))
        yield draft


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder beside ``path``; removed at the end with what is left in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, handle = _own_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Removes the drafts, here and one folder below, whose writers do not live any more."""
    below = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    for parent in (folder, *map(Path, below)):
        with suppress(OSError):  # of one that may not be read, and of a draft whose writer has just ended
            for name in os.listdir(parent):
                if is_draft(name) and (handle := _lock(parent / name, wait=False)) is not None:
                    shutil.rmtree(parent / name, ignore_errors=True)
                    os.close(handle)


def is_draft(name: str) -> bool:
    """Whether a folder is one of drafts, by its name."""
    return name.startswith(PREFIX) and name.endswith(SUFFIX)


def _own_folder(path: Path) -> tuple[Path, int | None]:
    """A new folder beside ``path``, and its open and locked handle, None where there are no locks."""
    while True:
        folder = path.parent / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:  # such as of a disk that is full: of the user's file, not of this one
            raise OSError(error.errno, error.strerror, str(path)) from error
        handle = _lock(folder, wait=True)
        if folder.exists():
            return folder, handle
        if handle is not None:  # swept between the two
            os.close(handle)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """The handle of a folder, locked; None for none, for one that another has locked, and where there are no locks."""
    if fcntl is None:
        return None
    with suppress(OSError):  # some network file systems do not lock folders
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return handle
        except OSError:
            os.close(handle)
    return None
