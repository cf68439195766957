"""Arguments of another kind than meant, such as a path where a run folder is, or two that were swapped: one sentence at
the door of what users call, instead of whatever would fail deep inside."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature, unwrap
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from metacontroller.errors import UserError
from metacontroller.ranges import shown

Function = TypeVar("Function", bound=Callable[..., Any])
_NAMES: dict[Any, str] = {type(None): "None", Callable: "a function", Sequence: "a list"}
_SCALARS = (str, int, float, bool, type(None))


def checked_kinds(function: Function) -> Function:
    """Decorator: UserError that names an argument, unless it is of a class that its annotation names.

    What is annotated as a number, a text or a choice alone is not looked at: these have ranges of their own.
    """
    parameters, kinds = signature(function), {}

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        try:
            arguments = parameters.bind(*given, **named).arguments
        except TypeError:  # one too many or too few: Python's own sentence is clear
            return function(*given, **named)
        if not kinds:  # at the first call, when all modules are there that annotations name
            kinds.update(get_type_hints(unwrap(function)))
        for name, value in arguments.items():
            _check(name, value, kinds.get(name, Any))
        return function(*given, **named)

    return call  # type: ignore[return-value]


def _check(name: str, value: Any, hint: Any) -> None:
    classes = _classes(hint)
    if not classes or all(kind in _SCALARS for kind in classes):
        return
    if not isinstance(value, classes) or (isinstance(value, str) and str not in classes):  # a text is no list of texts
        said = shown(value) if isinstance(value, (*_SCALARS, list, tuple, dict)) else f"a {type(value).__name__}"
        expected = " or ".join(_NAMES.get(kind, kind.__name__) for kind in classes)
        raise UserError(f"{name} is {said}; expected {expected}.")
    if get_origin(hint) is Sequence:
        for index, entry in enumerate(value):
            _check(f"{name}[{index}]", entry, get_args(hint)[0])


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes that an annotation allows; none where it says no class."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_classes(part) for part in get_args(hint)]
        return tuple(kind for part in parts for kind in part) if all(parts) else ()
    kind = get_origin(hint) or hint
    if kind is Any:  # which is a class
        return ()
    return (kind,) if isinstance(kind, type) and not getattr(kind, "_is_protocol", False) else ()
