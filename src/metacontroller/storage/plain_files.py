"""Reading what a stranger may have written: regular files only, of bounded size, strict JSON."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from metacontroller.errors import UserError

MAX_JSON_BYTES = 64 * 2**20
"""Of a JSON file; parsed, it takes some ten times as much memory."""


def file_digest(path: Path) -> dict[str, Any]:
    """The size of a file and its SHA-256, as files list it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


class NotStrictError(ValueError):
    """JSON that Python reads and the standard does not allow; `read_json` tells the user of it."""


def check_regular(path: Path) -> int:
    """The size of a file; UserError unless it is a regular one, or a link to one: a pipe or a device may never end.

    PermissionError for one that may not be read, of which some readers would say that it is not there.
    """
    try:
        found = path.stat()
    except PermissionError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is no regular file; put the file there that a run has written.")
    os.close(os.open(path, os.O_RDONLY))
    return found.st_size


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
    constant, number = (float, float) if infinite else (_refused, _finite)
    return json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=_once)


def _refused(constant: str) -> Any:
    raise NotStrictError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise NotStrictError(f"{text} is too large")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise NotStrictError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return dict(pairs)
