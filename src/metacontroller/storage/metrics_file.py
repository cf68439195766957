"""metrics.jsonl: lines that are only appended, read with their types checked.

A line that says ``"rewound": true`` takes back the lines of its phase after its step. Up to the last checkpoint the
manifest knows what was written (`storage.manifest`); of the lines after that, steps of a phase must not go back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacontroller.errors import UserError
from metacontroller.storage.files import MANIFEST, check_regular, parse_json

LONGEST = 2**20
"""Bytes of a line."""


def read_lines(path: Path, listed: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The lines of a file that were not taken back, without an incomplete last one; none where there is no file.

    listed: the size and SHA-256 of its first part, or None. UserError for a file that does not begin so, and for a line
    that is not valid or stands there twice.
    """
    size, expected = (0, hashlib.sha256().hexdigest()) if listed is None else (listed["size"], listed["sha256"])
    if not path.exists():
        if listed is None:
            return []
        raise _refused(path, f"is not there any more, but {size} bytes were written")
    if check_regular(path) < size:
        raise _refused(path, f"has less than the {size} bytes that were written: it was cut or swapped")
    lines: list[dict[str, Any]] = []
    number, left, digest = 0, size, hashlib.sha256()
    with path.open("rb") as file:
        while (text := file.readline(LONGEST)).endswith(b"\n"):
            number += 1
            digest.update(text[:left])
            left = max(0, left - len(text))
            _add(lines, _parsed(path, number, text), f"Line {number} of {path}")
    if len(text) == LONGEST:
        raise _bad_line(path, number + 1)
    if left or digest.hexdigest() != expected:
        raise _refused(path, "is not what was written (its SHA-256 differs): it was changed")
    return lines


def drop_torn_line(path: Path) -> None:
    """Cuts the file after its last complete line, so that the next line does not continue an incomplete one."""
    start = max(0, check_regular(path) - LONGEST)
    with path.open("rb") as file:
        file.seek(start)
        tail = file.read(LONGEST)
    end = tail.rfind(b"\n") + 1
    if tail and not end and start:
        raise _refused(path, f"has more than {LONGEST} bytes", "the last line of ")
    if end < len(tail):
        os.truncate(path, start + end)


def _add(lines: list[dict[str, Any]], line: dict[str, Any], place: str) -> None:
    """Adds a line, or takes back those that it says; UserError where its phase was as far already."""
    phase, step = line["phase"], line["step"]
    if line.get("rewound"):
        lines[:] = [one for one in lines if one["phase"] != phase or one["step"] <= step]
        return
    before = next((one for one in reversed(lines) if one["phase"] == phase), None)
    if before is not None and (step < before["step"] or line == before):
        raise UserError(
            f"{place} has the step {step} of {phase} again; two commands have written here, or lines were copied: "
            "delete those that stand there twice."
        )
    lines.append(line)


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    """A line with a phase, a step and otherwise numbers or null, or one that marks a rewind."""
    try:
        line = parse_json(text)
        rest = {name: value for name, value in line.items() if name not in ("phase", "step")}
        valid = isinstance(line["phase"], str) and type(line["step"]) is int
    except (ValueError, RecursionError, AttributeError, KeyError):
        raise _bad_line(path, number) from None
    if "rewound" in rest:
        valid = valid and len(rest) == 1 and rest["rewound"] is True
    else:
        valid = valid and all(value is None or type(value) in (int, float) for value in rest.values())
    if not valid:
        raise _bad_line(path, number)
    return {"phase": line["phase"], "step": line["step"], **rest}


def _bad_line(path: Path, number: int) -> UserError:
    return _refused(path, "is not a JSON object with a phase and a step, and numbers", f"Line {number} of ")


def _refused(path: Path, how: str, part: str = "") -> UserError:
    manifest = path.parent / MANIFEST
    mend = f"copy it from where it was made, or move {manifest} and what is left of it away, and go on without."
    return UserError(f"{part}{path} {how}; {mend}")
