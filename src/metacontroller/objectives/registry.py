"""Objectives by name: those of this package, and those of other packages through entry points, as in

[project.entry-points."metacontroller.objectives"]
mine = "my_package.mine:Mine"

An objective is a class of a `DiscoverConfig` and a `Setup`, and the name is the ``discovery`` of a run's config.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from metacontroller.errors import UserError
from metacontroller.objectives.base import Objective, Setup
from metacontroller.objectives.config import DiscoverConfig
from metacontroller.objectives.guided import Guided
from metacontroller.objectives.steering import Steering

GROUP = "metacontroller.objectives"
OBJECTIVES: dict[str, Callable[[DiscoverConfig, Setup], Objective]] = {"metacontroller": Steering}


def objective_names() -> list[str]:
    """All names of objectives."""
    return sorted({*OBJECTIVES, *(point.name for point in entry_points(group=GROUP))})


def make_objective(name: str, config: DiscoverConfig, setup: Setup) -> Objective:
    """The objective ``name``, after a guided start where the config asks for one.

    UserError for an unknown name, and if the setup lacks what the config asks for.
    """
    kind = OBJECTIVES.get(name) or next((point.load() for point in entry_points(group=GROUP, name=name)), None)
    if kind is None:
        raise UserError(f"discovery {name!r} is unknown; known are {', '.join(objective_names())}.")
    if config.clips and (not config.guided_updates or setup.decisions is None):
        raise UserError(f"clips is {config.clips}, but updates are not guided or no decisions are given; expected 0.")
    objective = kind(config, setup)
    return Guided(objective, config, setup) if config.guided_updates else objective
