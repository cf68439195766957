"""Functions of the user's that a command line names as package.module:function.

To find one its module is imported, which runs code. A name that a file holds, such as config.json of a folder that came
from somebody else, is therefore refused unless this user has given it: on this very command line, by --trust NAME, in
the variable METACONTROLLER_TRUST, names with spaces between, or when the config was written. Which configs these were
stands in a file of the user's own, outside all run folders.

`code_name` alone says what is a name of code. Whatever asks for trust and whatever imports goes by it, so that nothing
is imported that was taken for another text.
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
from typing import Any, NamedTuple

from metacontroller.errors import UserError, last_line

TRUST = "METACONTROLLER_TRUST"
"""The environment variable; worker processes inherit it."""

_WORD = "[A-Za-z_][A-Za-z0-9_]*"
_ID = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"({_WORD}(?:[.]{_WORD})*):((?:{_ID}/)?{_ID})")


class CodeName(NamedTuple):
    """A module to import, and what in it is meant: a function, or the ID of an environment that it registers."""

    module: str
    name: str


def code_name(text: Any) -> CodeName | None:
    """The parts of package.module:function, or of package.module:namespace/Environment-v0; None for anything else.

    Names are of ASCII letters, digits and underscores; an ID may have dots and dashes too.
    """
    match = _NAME.fullmatch(text) if isinstance(text, str) else None
    return None if match is None else CodeName(*match.groups())


@contextmanager
def trusting(names: Iterable[str]) -> Iterator[None]:
    """Context in which files may hold these names too; other words are no matter."""
    before = os.environ.get(TRUST)
    os.environ[TRUST] = " ".join([*(before or "").split(), *filter(code_name, names)])
    try:
        yield
    finally:
        os.environ.pop(TRUST)
        if before is not None:
            os.environ[TRUST] = before


def refuse_unknown_code(content: Any, where: Path) -> None:
    """UserError if JSON data of the file ``where`` hold a name of code that the user has not given."""
    for name in code_in(content):
        if name not in os.environ.get(TRUST, "").split() and not _remembered(name, where.parent):
            raise UserError(
                f"{where} names {name}, a module that would be imported and may do anything; if you know it, add "
                f"--trust {name} to the command."
            )


def remember_code(content: Any, folder: Path) -> None:
    """Notes that this user has given the names of code in a config of ``folder``, which is being written.

    Where the note cannot be kept, the names have to be given again.
    """
    missing = [name for name in code_in(content) if not _remembered(name, folder)]
    if missing:
        notes = [json.dumps([str(folder.resolve()), name]) for name in missing]
        with suppress(OSError):
            _notes().parent.mkdir(parents=True, exist_ok=True)
            with _notes().open("a", encoding="utf-8") as file:
                file.write("".join(f"\n{note}\n" for note in notes))  # apart from a line that a kill has cut


def code_in(content: Any, recognised: Callable[[Any], Any] = code_name) -> Iterator[str]:
    """All names of code in JSON data, however deep. recognised: what counts as one, where others than we import it."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
        elif recognised(value):
            yield value


def _notes() -> Path:
    """The user's file: a line [folder, name] for each name that a config in a folder, or below it, may hold."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "metacontroller" / "own_code.jsonl"


def _remembered(name: str, folder: Path) -> bool:
    """Whether a note allows it; a line that is no note, such as one that a kill has cut, says nothing."""
    lines: list[str] = []
    with suppress(OSError):
        lines = _notes().read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        with suppress(ValueError, RecursionError, TypeError):
            where, noted = json.loads(line)
            if noted == name and isinstance(where, str) and folder.resolve().is_relative_to(where):
                return True
    return False


def import_user_module(what: str, name: str, form: str = "package.module:function") -> tuple[ModuleType, str]:
    """The module that stands in ``name`` before the colon, from the current folder too, and what stands behind it.

    what: the option; form: of names, both for errors. UserError for another form, if there is no such module, if it
    needs one that is not installed, and for whatever it raises.
    """
    code = code_name(name)
    if code is None:
        raise UserError(f"{what} {name!r} is of another form; write {form}, in ASCII letters, digits and underscores.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with code_of_the_user(what, name):
        try:
            return import_module(code.module), code.name
        except ModuleNotFoundError as error:
            if not f"{code.module}.".startswith(f"{error.name}."):
                raise UserError(f"{what} {name!r} needs the module {error.name}, which is not installed.") from error
    raise UserError(
        f"{what} {name!r} names no module that can be imported; write {form}, and install the package or start in its "
        "folder."
    )


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
    """File and line where code of the user's raised: the last one in its own module; of a call that does not get in,
    such as one with arguments that it does not take, the file."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None) or frames[-1].filename
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"{file}, line {lines[-1]}" if lines else file


def import_user_function(what: str, name: str) -> Callable[..., Any]:
    """The function that ``name``, package.module:function, names; UserError if there is none."""
    module, function = import_user_module(what, name)
    value = getattr(module, function, None)
    if not callable(value):
        raise UserError(f"{what} {name!r} is no function of {module.__name__}; write package.module:function.")
    return value
