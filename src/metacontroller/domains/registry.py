"""Worlds by name: those of this package, and those of other packages through entry points, as in

[project.entry-points."metacontroller.domains"]
corridor = "my_package.corridor:Corridor"
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from metacontroller import domains
from metacontroller.domains.base import Domain
from metacontroller.errors import UserError

GROUP = "metacontroller.domains"


@cache
def _own_names() -> list[str]:
    """Worlds of this package."""
    return sorted(path.parent.name.replace("_", "-") for path in Path(domains.__path__[0]).glob("*/domain.py"))


def domain_names() -> list[str]:
    """All names of worlds."""
    return sorted({*_own_names(), *(point.name for point in entry_points(group=GROUP))})


def domain_class(name: str) -> type[Domain]:
    """The class of a world; UserError for an unknown name or an entry point that is not a `Domain` of that name."""
    if name in _own_names():
        module = importlib.import_module(f"{domains.__name__}.{name.replace('-', '_')}.domain")
        return next(kind for kind in vars(module).values() if _is_domain(kind, name))
    for point in entry_points(group=GROUP, name=name):
        kind = point.load()
        if not _is_domain(kind, name):
            raise UserError(f"entry point {point.value} is not a subclass of Domain with the name {name!r}; fix it.")
        return kind
    raise UserError(f"world {name!r} is unknown; known are {', '.join(domain_names())}.")


def domain_of(config: Any) -> Domain:
    """The world of a config; UserError if no world has this type of config."""
    for names in (_own_names, domain_names):  # entry points take long to read
        for kind in map(domain_class, names()):
            if kind.Config is type(config):
                return kind(config)
    raise UserError(
        f"a {type(config).__name__} is no config of a known world; register its world by an entry point of {GROUP!r}."
    )


def _is_domain(kind: Any, name: str) -> bool:
    return isinstance(kind, type) and issubclass(kind, Domain) and getattr(kind, "name", None) == name
