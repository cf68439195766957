"""Results on standard output: a table, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metacontroller.commands.options import seed_folders
from metacontroller.storage.run_folder import RunFolder


def say_unkept(*folders: RunFolder) -> None:
    """Tells what could not be kept in folders that may only be read, see `RunFolder.keeping`."""
    for folder in folders:
        if folder.unkept:
            names = ", ".join(folder.unkept)
            print(f"metacontroller: {folder.path} may only be read: {names} could not be kept.", file=sys.stderr)


def print_results(
    results: list[dict[str, Any]], folder: Path, table: Callable[[list[dict[str, Any]]], Table], *, as_json: bool
) -> None:
    """As a table, or as JSON: an object for a run's own folder, a list for a reproduction's."""
    if as_json:
        print(json.dumps(results[0] if seed_folders(folder) == [folder] else results, indent=2))
    else:
        Console().print(table(results))
