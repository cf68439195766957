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
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from metacontroller.errors import UserError, last_line

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


def import_user_module(what: str, name: str, form: str = "package.module:function") -> ModuleType:
    """The module of ``name``, what stands before the colon, from the current folder too.

    what: the option; form: of names, both for errors. UserError if there is none, if it needs one that is not
    installed, and for whatever it raises.
    """
    path = name.partition(":")[0]
    known = all(part.isidentifier() for part in path.split("."))
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module = None
    with code_of_the_user(what, name):
        try:
            module = import_module(path) if known else None
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                raise UserError(f"{what} {name!r} needs the module {error.name}, which is not installed.") from error
    if module is None:
        raise UserError(
            f"{what} {name!r} names no module that can be imported; write {form}, and install the package or start in "
            "its folder."
        )
    return module


@contextmanager
def code_of_the_user(what: str, name: str) -> Iterator[None]:
    """Context in which code of the user's runs: what it raises, sys.exit too, is a UserError that says what and where.

    what: the option that named it. Memory that ran out is let through.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} {name!r} raised {last_line(error)} ({_place(error, name)}); mend it there.") from error


def _place(error: BaseException, name: str) -> str:
    """File and line where code of the user's raised: the last one in its own module, if any is."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
    return f"{frame.filename}, line {frame.lineno}"


def import_user_function(what: str, name: str) -> Callable[..., Any]:
    """The function that ``name``, package.module:function, names; UserError if there is none."""
    module, function = import_user_module(what, name), name.partition(":")[2]
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{what} {name!r} is no function of {module.__name__}; write package.module:function.")
    return found
