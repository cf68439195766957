"""Presets: functions that return a complete config, by name.

A module of this package has ``PRESETS``, its functions by name, and may have ``STUDIES``, a `StudyConfig` for some of
them. The function ``laptop`` of the module ``gridworld`` is the preset ``gridworld-laptop``; a name without a dash is
one of that module, so that ``laptop`` means the same, or another module, whose ``laptop`` is meant.
``package.module:function`` names a function of yours.
"""

from __future__ import annotations

import pkgutil
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from types import ModuleType

from metacontroller.errors import UserError
from metacontroller.ranges import require
from metacontroller.recipes.config import ExperimentConfig, with_seed
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.storage.user_function import code_of_the_user, import_user_module

COMMON = "gridworld"
"""The module whose presets may be named without it."""

DEFAULT = "gridworld-laptop"
"""The preset of commands that are given none."""

OWN_DATA = "offline"
"""The preset of commands that are given a dataset and no preset."""


def preset(name: str) -> ExperimentConfig:
    """The config of a preset, with the seeds of its phases derived from its own; UserError if there is none of that
    name."""
    require(isinstance(name, str), "preset", name, f"a name, such as {DEFAULT!r}")
    module, function = _find(name)
    chosen = getattr(module, "PRESETS", {}).get(function) or getattr(module, function, None)
    if not callable(chosen):
        raise UserError(f"preset {name!r} is no function of {module.__name__}; name one that takes no arguments.")
    try:
        signature(chosen).bind()
    except TypeError as error:
        raise UserError(f"preset {name!r} takes arguments ({error}); name a function that takes none.") from None
    with code_of_the_user("preset", name) if ":" in name else nullcontext():
        config = chosen()
    if not isinstance(config, ExperimentConfig):
        raise UserError(
            f"preset {name!r} returned a {type(config).__name__}; expected an ExperimentConfig "
            "(metacontroller.recipes.config)."
        )
    return with_seed(config, config.seed)


def preset_names() -> list[str]:
    """The names of all presets in this package."""
    return [f"{module}-{function}" for module in _modules() for function in _module(module).PRESETS]


def study_config(name: str) -> StudyConfig:
    """How much `metacontroller figures` does of a preset; the defaults where its module has nothing to say."""
    module, function = _find(name)
    return getattr(module, "STUDIES", {}).get(function, StudyConfig())


def _modules() -> list[str]:
    return sorted(part.name for part in pkgutil.iter_modules(__path__))


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")


def _find(name: str) -> tuple[ModuleType, str]:
    """The module of a preset and its name there."""
    if ":" in name:
        return import_user_module("preset", name)
    module, dash, function = name.partition("-")
    if not dash:
        module, function = (name, "laptop") if name in _modules() else (COMMON, name)
    if module in _modules() and function in _module(module).PRESETS:
        return _module(module), function
    raise UserError(
        f"preset {name!r} is unknown; known are {', '.join(preset_names())}, and package.module:function for your own."
    )
