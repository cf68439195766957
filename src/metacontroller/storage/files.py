"""Atomic writes, and reading and writing JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metacontroller.errors import UserError
from metacontroller.storage import manifest
from metacontroller.storage.drafts import drafting, is_draft
from metacontroller.storage.lock import LOCK
from metacontroller.storage.plain_files import read_json


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`; it replaces `path` when the block succeeds, and is removed otherwise, see
    `storage.drafts`.

    The file gets the permissions that the process's umask leaves, whatever wrote it, and is listed in the manifest of
    its run folder, if it has one.
    """
    with drafting(path) as draft:
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)
        _sync(draft)
        manifest.record(path, draft)
        os.replace(draft, path)
    if os.name == "posix":  # the new name is on disk only once its folder is; other systems cannot sync a folder
        _sync(path.parent)


def left_behind(path: Path) -> bool:
    """Whether a file is the lock or the manifest of a writer, or a draft, and may be all that a killed one left."""
    return path.name in (LOCK, manifest.NAME) or is_draft(path.name)


def _sync(path: Path) -> None:
    # Windows syncs only what is open for writing, and a folder can be opened for reading only.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a text file, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; UserError if it holds anything else, or is not what its run wrote."""
    value = read_json(path)
    manifest.verify(path)
    return value


def inside(folder: Path, path: Path) -> Path:
    """The path; UserError if a link or a name leads from there out of the folder."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is a link that leads nowhere; put the file there that the run has written.") from error
    if not resolved.is_relative_to(folder.resolve()):
        raise UserError(f"{path} leads to {resolved}, out of {folder}; put the file itself there.")
    return path


def read_regular(folder: Path, path: Path, most: int) -> bytes | None:
    """What a file of the folder holds; None unless it is a regular one there, of at most so many bytes.

    No link is followed out of the folder, and no pipe is waited for.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        with open(inside(folder, path), "rb", opener=opener) as file:
            found = os.fstat(file.fileno())
            return file.read() if stat.S_ISREG(found.st_mode) and found.st_size <= most else None
    except (UserError, OSError):
        return None


def plain(value: Any) -> Any:
    """Convert a value for `json`, as its argument `default`; TypeError for types that have no JSON form."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # tensors, arrays and numpy scalars
        return value.tolist()
    raise TypeError(f"A {type(value).__name__} cannot be written as JSON; give numbers, strings, lists or mappings.")


def strict_json(value: Any) -> Any:
    """Return `value` as strict JSON allows it: NaN and infinities become None."""
    return json.loads(json.dumps(value, default=plain), parse_constant=lambda _: None)
