"""Calls of our own classes with keywords that the classes of the same names in metacontroller-pytorch have."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import signature
from typing import NoReturn, ParamSpec, TypeVar

from metacontroller.errors import UserError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def explains_other_keywords(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A method that answers a keyword of the other library's method of the same name by saying where that is."""
    known = signature(function).parameters

    @wraps(function)
    def checked(*args: Parameters.args, **given: Parameters.kwargs) -> Result:
        unknown = given.keys() - known
        if unknown:
            classes = vars(import_module("metacontroller.metacontroller"))
            owner = next(kind.__name__ for kind in type(args[0]).__mro__ if kind.__name__ in classes)
            theirs = signature(getattr(classes[owner], function.__name__)).parameters
            for keyword in sorted(unknown & theirs.keys()):
                refuse_keyword(owner, keyword)
        return function(*args, **given)

    return checked


def refuse_keyword(owner: str, keyword: str) -> NoReturn:
    """UserError for a keyword of the other library."""
    raise UserError(
        f"{owner} takes no {keyword!r}, a keyword of metacontroller-pytorch, whose names are those of "
        "metacontroller.metacontroller here; change your imports: "
        "sed -i 's/from metacontroller import/from metacontroller.metacontroller import/' YOUR_SCRIPT.py"
    )
