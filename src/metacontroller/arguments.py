"""Arguments of another kind than meant, such as a path where a run folder is, or two that were swapped: one sentence at
the door of what users call, instead of whatever would fail deep inside."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import wraps
from inspect import signature, unwrap
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from metacontroller.ranges import check

Function = TypeVar("Function", bound=Callable[..., Any])


def checked_kinds(function: Function) -> Function:
    """Decorator: `ranges.check` of each argument by its annotation, but for plain numbers, texts and truth values."""
    parameters, kinds = signature(function), {}

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        try:
            arguments = parameters.bind(*given, **named).arguments
        except TypeError:  # one too many or too few: Python's own sentence is clear
            return function(*given, **named)
        if not kinds:  # at the first call, when all modules are there that annotations name
            kinds.update(checked_hints(unwrap(function)))
        for name, value in arguments.items():
            if name in kinds:
                check(name, value, kinds[name])
        return function(*given, **named)

    return call  # type: ignore[return-value]


def checked_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's arguments that say more than a plain number, text or truth value."""
    hints = get_type_hints(function, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return" and not _is_plain(hint)}


def _is_plain(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return all(map(_is_plain, get_args(hint)))
    return hint in (str, int, float, bool, type(None), Any) or getattr(hint, "_is_protocol", False)
