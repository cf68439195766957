"""JSON files that no manifest lists, such as a dataset's: each carries the SHA-256 of what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacontroller.errors import UserError

SEAL = "sealed"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their SHA-256 under `SEAL`."""
    plain = json.loads(json.dumps({name: value for name, value in content.items() if name != SEAL}))
    return {**plain, SEAL: _digest(plain)}


def check_seal(path: Path, content: Mapping[str, Any]) -> None:
    """UserError unless what was read from a file is what was sealed."""
    said = {name: value for name, value in content.items() if name != SEAL}
    if content.get(SEAL) != _digest(said):
        raise UserError(
            f"{path} is not what was written (its SHA-256 differs): it was changed; copy it from where it was made, or "
            "make it anew."
        )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.JSONEncoder(sort_keys=True).encode(content).encode()).hexdigest()
