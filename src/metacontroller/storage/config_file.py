"""Reading nested config dataclasses from JSON, with errors that name the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from metacontroller.errors import UserError
from metacontroller.ranges import check, require

Config = TypeVar("Config")


def from_plain(kind: type[Config], data: Any, where: str = "config") -> Config:
    """Builds the dataclass ``kind``, with nested dataclasses and tuples, from a parsed JSON object.

    The value of a field of type ``Any`` is not converted. where: name of the object, for errors. UserError for an
    unknown field, for a missing one, whether or not it has a default, and for a value of the wrong type.
    """
    require(isinstance(data, Mapping), where, data, f"an object with the fields of {kind.__name__}")
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in sorted(data.keys() - {*fields}):
        raise UserError(f"{where} has an unknown field {name!r}; known are {', '.join(fields)}.")
    for name in fields:
        if name not in data:
            raise UserError(f"{where} lacks the field {name!r}; add it.")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if dataclasses.is_dataclass(kinds[0]) and (value is not None or type(None) not in kinds):
        return from_plain(kinds[0], value, where)  # type: ignore[arg-type]
    check(where, value, hint)
    return _tuples(value) if any(get_origin(kind) is tuple for kind in kinds) else value


def _tuples(value: Any) -> Any:
    """Lists, at any depth of them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
