"""Atomic writes, and reading and writing JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metacontroller.errors import UserError
from metacontroller.storage.lock import LOCK


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` when the block succeeds, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name is on disk only once its folder is; other systems cannot sync a folder
        _sync(path.parent)


def left_behind(path: Path) -> bool:
    """Whether a file is the lock of a writer, or the draft of one that was killed."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


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
        temporary.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; UserError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fix or delete it.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object was expected; fix or delete it.")
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
