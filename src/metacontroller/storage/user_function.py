"""Functions of the user's that a command line names as package.module:function."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from metacontroller.errors import UserError


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
