"""Functions of the user's that a command line names as package.module:function.

To find one its module is imported, which runs code. A name that a file holds, such as config.json of a folder that came
from somebody else, is therefore refused unless this user has given it: on this very command line, by --trust NAME, in
the variable METACONTROLLER_TRUST, names with spaces between, or when the config was written. Which configs these were
stands in a file of the user's own, outside all run folders.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from metacontroller.errors import UserError

TRUST = "METACONTROLLER_TRUST"
"""The environment variable; worker processes inherit it."""

_NAME = re.compile(r"[A-Za-z_][\w.]*:[^\s/\\\\]+")


def is_code(text: Any) -> bool:
    """Whether a value is a name such as package.module:function, for which a module would be imported."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None and not os.path.exists(text)


@contextmanager
def trusting(names: Iterable[str]) -> Iterator[None]:
    """Context in which files may hold these names too."""
    before = os.environ.get(TRUST)
    os.environ[TRUST] = " ".join([*(before or "").split(), *names])
    try:
        yield
    finally:
        os.environ.pop(TRUST)
        if before is not None:
            os.environ[TRUST] = before


def refuse_unknown_code(content: Any, where: Path) -> None:
    """UserError if JSON data of the file ``where`` hold a name of code that the user has not given."""
    for name in _code_in(content):
        if name not in os.environ.get(TRUST, "").split() and not _remembered(name, where.parent):
            raise UserError(
                f"{where} names {name}, a module that would be imported and may do anything; if you know it, add "
                f"--trust {name} to the command."
            )


def remember_code(content: Any, folder: Path) -> None:
    """Notes that this user has given the names of code in a config of ``folder``, which is being written.

    Where the note cannot be kept, the names have to be given again.
    """
    missing = [name for name in _code_in(content) if not _remembered(name, folder)]
    if missing:
        with suppress(OSError):
            _notes().parent.mkdir(parents=True, exist_ok=True)
            with _notes().open("a") as file:
                file.writelines(json.dumps([str(folder.resolve()), name]) + "\n" for name in missing)


def _code_in(content: Any) -> Iterator[str]:
    """All names of code in JSON data."""
    if isinstance(content, Mapping):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for entry in content:
            yield from _code_in(entry)
    elif is_code(content):
        yield content


def _notes() -> Path:
    """The user's file: a line [folder, name] for each name that a config in a folder, or below it, may hold."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "metacontroller" / "own_code.jsonl"


def _remembered(name: str, folder: Path) -> bool:
    try:
        notes = [json.loads(line) for line in _notes().read_text().splitlines()]
    except (OSError, ValueError):
        return False
    return any(noted == name and folder.resolve().is_relative_to(where) for where, noted in notes)


def import_user_module(what: str, name: str) -> ModuleType:
    """The module of ``name``, package.module:function, from the current folder too.

    what: the option, for errors. UserError if there is none, or if it needs one that is not installed.
    """
    path = name.partition(":")[0]
    known = all(part.isidentifier() for part in path.split("."))
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(path) if known else None
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise UserError(f"{what} {name!r} needs the module {error.name}, which is not installed.") from error
        module = None
    if module is None:
        raise UserError(
            f"{what} {name!r} names no module that can be imported; write package.module:function, and install the "
            "package or start in its folder."
        )
    return module


def import_user_function(what: str, name: str) -> Callable[..., Any]:
    """The function that ``name``, package.module:function, names; UserError if there is none."""
    module, function = import_user_module(what, name), name.partition(":")[2]
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{what} {name!r} is no function of {module.__name__}; write package.module:function.")
    return found
