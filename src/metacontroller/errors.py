"""What the user did wrong, and what went wrong around the program, apart from what is wrong with the program."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class UserError(ValueError):
    """A mistake of the user's: one sentence that names the value, what was expected, and how to mend it.

    The command line prints it without a traceback; any other exception is taken for a bug. status: with which the
    command line then exits.
    """

    status: int = 2


class MissingFileError(UserError, FileNotFoundError):
    """A file that an earlier command should have left is not there."""


class DivergedError(UserError):
    """Training met a loss, gradient, parameter, return or fitness that is not finite, and stopped there."""

    status = 3


def import_extra(module: str, extra: str) -> Any:
    """A module that comes with an extra of this package; UserError if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        name = module.rpartition(".")[2]
        message = f"{name} is not installed; install it by: pip install 'metacontroller-rl[{extra}]'."
        raise UserError(message) from error


def last_line(error: BaseException) -> str:
    """Type and text of an exception, as a traceback ends with them, without the last dot."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
