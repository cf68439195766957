"""Files: what a stranger may have written is read with care, and what is written takes its place once it is whole.

Read are regular files of bounded size, strict JSON, and nothing to which a link leads out of the folder. A draft of a
file stands in a new folder beside its place, ``.metacontroller-RANDOM.tmp``, which is locked while its writer lives:
what a killed one has left is known by that, and removed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metacontroller.errors import UserError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

MAX_JSON_BYTES = 64 * 2**20
"""Of a JSON file; parsed, it takes some ten times as much memory."""
LOCK, MANIFEST = ".lock", "manifest.json"
"""Files that stand beside those of the user's, see `storage.lock` and `storage.manifest`."""
PREFIX, SUFFIX = ".metacontroller-", ".tmp"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def check_regular(path: Path) -> int:
    """The size of a file; UserError unless it is a regular one, or a link to one: a pipe or a device may never end.

    PermissionError for one that may not be read, of which some readers would say that it is not there.
    """
    try:
        status = path.stat()
    except PermissionError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file; put the file there that a run has written.")
    os.close(os.open(path, os.O_RDONLY))
    return status.st_size


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
    """What a file of the folder holds; None unless it is a regular one there, of at most so many bytes."""
    with suppress(UserError, OSError):
        if check_regular(inside(folder, path)) <= most:
            return path.read_bytes()
    return None


def file_digest(path: Path) -> dict[str, Any]:
    """The size of a file and its SHA-256, as manifests and headers of datasets list it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def is_file_digest(value: Any) -> bool:
    """Whether a JSON value is of the form that `file_digest` returns."""
    return isinstance(value, dict) and {key: type(part) for key, part in value.items()} == {"size": int, "sha256": str}


def read_json(path: Path, *, infinite: bool = False) -> dict[str, Any]:
    """The JSON object in a file; UserError if it holds anything else, names something twice, or is too large.

    infinite: whether numbers may be NaN and infinite, as Python writes them.
    """
    size = check_regular(path)
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path} has {size} bytes where at most {MAX_JSON_BYTES} were expected; fix or delete it.")
    try:
        value = parse_json(path.read_bytes(), infinite=infinite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fix or delete it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object was expected; fix or delete it.")
    return value


def parse_json(text: bytes | str, *, infinite: bool = False) -> Any:
    """The value of strict JSON in UTF-8; ValueError or RecursionError for anything else. infinite: as `read_json`."""
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    number = float if infinite else _finite
    return json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=_without_repeats)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise UserError(f"{text} is no number of JSON, or too large")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"{max(names, key=names.count)!r} stands there twice")
    return value


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


@contextmanager
def folder_lock(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Context in which a folder is locked, until the process ends at the latest. Yields False where another has locked
    it, and where folders cannot be locked, as on some network file systems."""
    handle, locked = None, False
    with suppress(OSError):
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | NO_LINK)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
    try:
        yield locked
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder beside ``path``; removed at the end with what is left in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = _new_folder(path)
        with folder_lock(folder):
            if not folder.exists():  # swept before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextmanager
def draft_file(path: Path) -> Iterator[Path]:
    """Yields a new, empty file beside ``path``, to fill and to move there; removed at the end unless moved.

    Its name has no ending, so that nobody who looks for files takes it for one that is whole. What writes it may
    replace it, as safetensors does.
    """
    with draft_folder(path) as folder:
        draft = folder / "draft"
        os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666))
        yield draft


def sweep(folder: Path) -> None:
    """Removes the drafts, here and one folder below, whose writers do not live any more."""
    below = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    for parent in (folder, *map(Path, below)):
        with suppress(OSError):  # of one that may not be read
            for name in filter(_is_draft, os.listdir(parent)):
                with folder_lock(parent / name, wait=False) as abandoned:
                    if abandoned:
                        shutil.rmtree(parent / name, ignore_errors=True)


def left_behind(path: Path) -> bool:
    """Whether a file is the lock or the manifest of a writer, or a draft, and may be all that a killed one left."""
    return path.name in (LOCK, MANIFEST) or _is_draft(path.name)


def _is_draft(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith(SUFFIX)


def _new_folder(path: Path) -> Path:
    folder = path.parent / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:  # such as of a disk that is full: of the user's file, not of this one
        raise OSError(error.errno, error.strerror, str(path)) from error
    return folder
