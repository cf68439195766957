"""Results on standard output: a table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metacontroller.commands.options import seed_folders


def print_results(
    results: list[dict[str, Any]], folder: Path, table: Callable[[list[dict[str, Any]]], Table], *, as_json: bool
) -> None:
    """As a table, or as JSON: an object for a run's own folder, a list for a reproduction's."""
    if as_json:
        print(json.dumps(results[0] if seed_folders(folder) == [folder] else results, indent=2))
    else:
        Console().print(table(results))
