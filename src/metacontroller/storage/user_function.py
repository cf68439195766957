"""Functions of the user's that a command line names as package.module:function.

To find one its module is imported, which runs code. A name that a file holds, such as config.json of a folder that came
from somebody else, is therefore refused unless the user has given it: on this very command line, by --trust NAME, or in
the variable METACONTROLLER_TRUST, names with spaces between.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
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


def refuse_unknown_code(content: Any, where: str) -> None:
    """UserError if JSON data of the file ``where`` hold a name of code that the user has not given."""
    if isinstance(content, Mapping):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for entry in content:
            refuse_unknown_code(entry, where)
    elif is_code(content) and content not in os.environ.get(TRUST, "").split():
        raise UserError(
            f"{where} names {content}, a module that would be imported and may do anything; if you know it, add "
            f"--trust {content} to the command."
        )


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
