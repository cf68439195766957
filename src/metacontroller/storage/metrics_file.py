"""metrics.jsonl: lines that are only appended, read with their types checked.

A line that says ``"rewound": true`` takes back the lines of its phase after its step. Up to the last checkpoint the
manifest knows what was written (`storage.manifest`); of the lines after that, steps of a phase must not go back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from metacontroller.errors import UserError
from metacontroller.storage.files import check_regular, parse_json

LONGEST = 2**20
"""Bytes of a line."""


def read_lines(path: Path, listed: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The lines of a file that were not taken back, without an incomplete last one; none where there is no file.

    listed: the size and SHA-256 of its first part, or None. UserError for a file that does not begin so, and for a line
    that is not valid or stands there twice.
    """
    if not path.exists():
        if listed is None:
            return []
        raise UserError(f"{path} is not there any more, but {listed['size']} bytes were written; {_mend(path)}")
    left, digest = 0 if listed is None else listed["size"], hashlib.sha256()
    if check_regular(path) < left:
        raise UserError(
            f"{path} has less than the {left} bytes that were written: it was cut or swapped; {_mend(path)}"
        )
    kept: list[dict[str, Any]] = []
    reached: dict[str, dict[str, Any]] = {}  # by phase: its last line
    with path.open("rb") as file:
        number = 0
        while (text := file.readline(LONGEST)).endswith(b"\n"):
            number += 1
            digest.update(text[:left])
            left = max(0, left - len(text))
            line = _parsed(path, number, text)
            phase, step = line["phase"], line["step"]
            if line.get("rewound"):
                kept = [one for one in kept if one["phase"] != phase or one["step"] <= step]
                reached = {one["phase"]: one for one in kept}
                continue
            before = reached.get(phase)
            if before is not None and (step < before["step"] or line == before):
                raise UserError(
                    f"Line {number} of {path} has the step {step} of {phase} again; two commands have written here, or "
                    "lines were copied: delete those that stand there twice."
                )
            kept.append(line)
            reached[phase] = line
    if len(text) == LONGEST:
        raise _bad_line(path, number + 1)
    if listed is not None and (left or digest.hexdigest() != listed["sha256"]):
        raise UserError(f"{path} is not what was written (its SHA-256 differs): it was changed; {_mend(path)}")
    return kept


def drop_torn_line(path: Path) -> None:
    """Cuts the file after its last complete line, so that the next line does not continue an incomplete one."""
    size = check_regular(path)
    with path.open("rb") as file:
        start = max(0, size - LONGEST)
        file.seek(start)
        tail = file.read(LONGEST)
    if tail.endswith(b"\n") or not tail:
        return
    end = tail.rfind(b"\n") + 1
    if not end and start:
        raise UserError(f"the last line of {path} has more than {LONGEST} bytes; {_mend(path)}")
    os.truncate(path, start + end)


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        parsed = parse_json(text)
    except (ValueError, RecursionError):
        parsed = None
    if not _is_metrics(parsed):
        raise _bad_line(path, number)
    return {"phase": parsed["phase"], "step": parsed["step"], **parsed}


def _bad_line(path: Path, number: int) -> UserError:
    return UserError(
        f"Line {number} of {path} is not a JSON object with a phase and a step, and numbers; {_mend(path)}"
    )


def _mend(path: Path) -> str:
    others = path.parent / "manifest.json"
    return f"copy it from where it was made, or move {others} and what is left of it away, and go on without."


def _is_metrics(line: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a line has a phase, a step and otherwise numbers or null, or marks a rewind."""
    if not isinstance(line, dict) or not isinstance(line.get("phase"), str) or type(line.get("step")) is not int:
        return False
    rest = {name: value for name, value in line.items() if name not in ("phase", "step")}
    if "rewound" in rest:
        return len(rest) == 1 and rest["rewound"] is True
    return all(value is None or type(value) in (int, float) for value in rest.values())
