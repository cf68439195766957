"""Reading nested config dataclasses from JSON, with errors that name the field."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from metacontroller.errors import UserError

Config = TypeVar("Config")


def from_plain(kind: type[Config], data: Any, where: str = "config") -> Config:
    """Builds the dataclass ``kind``, with nested dataclasses and tuples, from a parsed JSON object.

    The value of a field of type ``Any`` is not converted. where: name of the object, for errors. UserError for an
    unknown field, for a missing one, whether or not it has a default, and for a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is {data!r}; expected an object with the fields of {kind.__name__}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(data.keys() - fields.keys())
    if unknown:
        raise UserError(f"{where} has an unknown field {unknown[0]!r}; known are {', '.join(fields)}.")
    missing = [name for name in fields if name not in data]
    if missing:
        raise UserError(f"{where} lacks the field {missing[0]!r}; add it.")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _value(inner[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where} is {value!r}; expected one of {', '.join(map(repr, arguments))}.")
        return value
    return _scalar(hint, value, where)


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where} is {value!r}; expected a list.")
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(value) != len(arguments):
        raise UserError(f"{where} has {len(value)} entries; expected {len(arguments)}.")
    return tuple(
        _value(hint, entry, f"{where}[{index}]")
        for index, (hint, entry) in enumerate(zip(arguments, value, strict=True))
    )


def _scalar(hint: type, value: Any, where: str) -> Any:
    allowed = (int, float) if hint is float else (hint,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}; expected {hint.__name__}.")
    return value
