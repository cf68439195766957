"""One Gymnasium environment: found by its ID, asked for its spaces, and guarded so that it can step beside others."""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from metacontroller.data.spaces import action_options, parts_of, put_together, readable, spec_kwargs
from metacontroller.domains.border import Misfit, began, fitted, observed, stepped
from metacontroller.errors import UserError, last_line
from metacontroller.ranges import shown
from metacontroller.storage.user_function import code_in, import_user_module
from metacontroller.storage.versions import OWN_PACKAGE, record

FLAGS = ("terminated", "truncated", "success", "lost")

LOST: Counter[tuple[str, str]] = Counter()
"""Exceptions in this process, by the environment's ID and their type."""

BEGUN: Counter[str] = Counter()
"""Episodes in this process, by the environment's ID."""

WAY_OUT = "mend the environment, or wrap it, in wider bounds if it leaves those that it declares (docs/own-data.md)"
"""Where an environment returns what is not of its spaces."""

FEW = 4
"""Episodes of a kind below which nothing is said of their success."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:[.][A-Za-z_]\w*)+")
_ENDED: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros((2, 4)))
"""Of episodes in this process whose success only their end tells, by ID: those not solved, and those solved; how many,
steps, returns and last rewards."""
_DOUBTED: set[str] = set()


@lru_cache
def environment_id(name: str) -> str:
    """A Gymnasium ID as ``module:ID`` where a package has to be imported for Gymnasium to know it.

    Packages register their environments when they are imported. If the ID alone is not known, the installed packages
    that build on Gymnasium are imported, those first whose name is part of the ID. UserError if none knows it.
    """
    reason = _unknown(name)
    if reason is None:
        return name
    for module in [] if ":" in name else _modules_on_gymnasium(name):
        with _without_warnings(), suppress(Exception, SystemExit):  # whatever a package does that is not asked for
            importlib.import_module(module)
        if _unknown(name) is None:
            return f"{module}:{name}"
    raise UserError(
        f"env {name!r} is no environment of Gymnasium's or of an installed package ({reason}); install the package "
        "that has it, or write module:ID where importing a module of yours registers it."
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unknown(name: str) -> str | None:
    """What Gymnasium has against an ID; None if it knows it. A module that it names is imported: UserError if it
    cannot be."""
    try:
        with _without_warnings():  # of packages that are imported, and of old versions of environments
            gymnasium.spec(import_user_module("env", name, "module:ID")[1] if ":" in name else name)
    except gymnasium.error.Error as error:
        return str(error).rstrip(".")
    return None


def _modules_on_gymnasium(name: str) -> list[str]:
    """Modules of the installed packages that need Gymnasium; first those whose name is part of the environment's."""
    packages = set()
    for distribution in metadata.distributions():
        package = distribution.metadata["Name"] or ""
        needs = (need.partition(";") for need in distribution.requires or [])
        builds = any(need.startswith("gymnasium") and "extra" not in mark for need, _, mark in needs)
        if builds and package != OWN_PACKAGE:
            packages.add(package.replace("-", "_"))
    return sorted(packages, key=lambda package: (package.lower() not in name.lower(), package))


class EnvironmentFacts(NamedTuple):
    """Spaces, those of observations as far as a model reads them; the time limit, None if there is none; the keywords
    with which it was made, those that its ID brings among them, see `spec_kwargs`; and the record of the environment
    and its packages, see `storage.versions`."""

    observation_space: spaces.Space
    action_space: spaces.Space
    max_steps: int | None
    kwargs: str | None
    versions: dict[str, str]


@lru_cache
def environment_facts(name: str, kwargs: str | None = None) -> EnvironmentFacts:
    """What one environment says of itself; UserError if it cannot be made or reset, or if a model cannot act in it."""
    env = make_environment(name, kwargs)
    try:
        seen = readable(env.observation_space)
        action_options(env.action_space)
        limit = None if env.spec is None else env.spec.max_episode_steps
        own = getattr(env.unwrapped, "max_steps", None)
        limits = [int(steps) for steps in (limit, own) if isinstance(steps, int | np.integer) and steps > 0]
        try:
            observed(env.observation_space, seen, began(env, seed=0)[0])
        except (Exception, SystemExit) as error:
            raise _no_reset(name, error) from error
        versions = record(name, _modules(env.unwrapped))
        return EnvironmentFacts(seen, env.action_space, min(limits, default=None), spec_kwargs(env.spec), versions)
    finally:
        with suppress(Exception, SystemExit):
            env.close()


def _modules(env: Any) -> set[str]:
    """Top-level modules of the classes that an environment is and holds, such as mujoco, and those in its attribute
    ``packages``."""
    kinds = [*type(env).__mro__, *map(type, vars(env).values())]
    return {kind.__module__.partition(".")[0] for kind in kinds} | {*getattr(env, "packages", ())}


def make_environment(name: str, kwargs: str | None = None) -> gymnasium.Env:
    """A new environment of that ID, kwargs: see `keywords`; UserError if it cannot be made."""
    options = keywords(kwargs)
    try:
        with _without_warnings():
            return gymnasium.make(environment_id(name), disable_env_checker=True, **options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"env {name!r} cannot be made: {last_line(error)}.") from error


def keywords(text: str | None) -> dict[str, Any]:
    """Keywords of `gymnasium.make` in a JSON object, such as ``{"is_slippery": false}``.

    UserError for other text, and for whatever may be a name of code, any text with a colon, and a dotted path into a
    module that is here: a few environments import what their keywords name, by rules of their own, and these may come
    from somebody else's file.
    """
    try:
        options = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"env_kwargs are {shown(text)} ({error}); expected a JSON object.") from error
    if not isinstance(options, dict):
        raise UserError(f'env_kwargs are {shown(text)}; expected a JSON object, such as {{"is_slippery": false}}.')
    named = next(code_in(options, _may_be_code), None)
    if named is not None:
        raise UserError(
            f"env_kwargs name {named}, a module that would be imported; register such an environment in a module of "
            "yours, and write module:ID."
        )
    return options


def _may_be_code(value: Any) -> bool:
    """Whether a text has a colon, or is a dotted path whose first word is a module; nothing is imported."""
    if not isinstance(value, str):
        return False
    first = value.partition(".")[0]
    here = _DOTTED.fullmatch(value) is not None and (first in sys.modules or find_spec(first) is not None)
    return here or ":" in value


def _no_reset(name: str, error: BaseException) -> UserError:
    said = f"{error}; {WAY_OUT}" if isinstance(error, Misfit) else last_line(error)
    return UserError(f"env {name!r} cannot be reset: {said}.")


def _kind(space: spaces.Space) -> Any:
    """What all environments of one ID must have in common: everything but the bounds of a Box."""
    if parts := parts_of(space):
        return put_together(space, {key: _kind(part) for key, part in parts})
    return (space.shape, space.dtype) if isinstance(space, spaces.Box) else space


def tell_lost(name: str, error: BaseException) -> None:
    """Counts an exception that ended an episode; the first, tenth, hundredth ... of its kind is printed, with how many
    episodes it cost."""
    kind = type(error).__name__
    LOST[name, kind] += 1
    count = LOST[name, kind]
    if str(count).strip("0") == "1":
        said, way = (f": {error}", f"; {WAY_OUT}") if isinstance(error, Misfit) else (f" raised {last_line(error)}", "")
        ends = f"its episode ends here and is lost, {count:,} of {BEGUN[name]:,} by now"
        print(f"metacontroller: {name}{said}; {ends}{way}.", file=sys.stderr, flush=True)


def tell_doubtful_success(name: str, solved: bool, steps: int, returned: float, last: float) -> None:
    """Says once where termination, which counts as success if it is paid, looks like failure.

    That is where the episodes that count as solved are shorter and worth less than the others, or where their last step
    pays no more than those before. last: the reward of the last step.
    """
    ended = _ENDED[name]
    ended[int(solved)] += (1, steps, returned, last)
    (others, longer, better, _), (count, length, worth, paid) = ended
    if name in _DOUBTED or count < FEW:
        return
    less = others >= FEW and length / count < longer / others and worth / count < better / others
    alike = length > count and paid / count <= 1.000001 * (worth - paid) / (length - count)
    if less or alike:
        _DOUBTED.add(name)
        why = "its last step pays no more"
        if less:
            why = f"the others have {longer / others:.3g} and {better / others:.3g}"
        print(
            f"metacontroller: {name} may end where an episode fails: one that counts as solved has "
            f"{length / count:.3g} steps and a return of {worth / count:.3g} on average, and {why}. State the return "
            "that counts as success: --success-return of collect, --config.domain.success-return of pretrain, or of "
            "internal-rl before it has begun.",
            file=sys.stderr,
            flush=True,
        )


@dataclass(frozen=True)
class GuardedEnvironment:
    """Makes guarded environments of one ID, in this process or in another. success_return: see `Guard`; kwargs: see
    `keywords`."""

    name: str
    success_return: float | None = None
    kwargs: str | None = None

    @cached_property
    def facts(self) -> EnvironmentFacts:
        """Those of the first environment, for all: others may have other bounds. They go to worker processes too."""
        return environment_facts(self.name, self.kwargs)

    def make(self) -> gymnasium.Env:
        """A new environment; UserError if its spaces differ in more than bounds from those of the first."""
        env, first = make_environment(self.name, self.kwargs), self.facts
        for space, before in zip((readable(env.observation_space), env.action_space), first[:2], strict=True):
            if _kind(space) != _kind(before):
                raise UserError(
                    f"env {self.name!r} has the space {shown(space)} where it had {shown(before)} when it was first "
                    "made; it must be of one kind, whatever its bounds."
                )
        return env


class Guard:
    """An environment that can step beside others that have ended, and that outlives its own exceptions.

    last: the observation as the environment gave it; read: the same without text, in the type of its space; flags: how
    the episode stands. Once it has ended it ignores actions, with reward 0. An action of a Box is cut to the bounds of
    this very environment.

    An exception, sys.exit too, and whatever is not finite or not of its space (`domains.border`) end the episode as
    truncated and lost; the next ``reset`` makes a new environment. UserError if the first ``reset`` fails so.

    Success is what the last info that carries "success" or "is_success" says. Where none does: with success_return,
    whether the return is at least that; without, whether the episode terminated with a positive reward.
    """

    def __init__(self, maker: GuardedEnvironment) -> None:
        self.maker = maker
        self._renew()
        self.flags = dict.fromkeys(FLAGS, False)
        self.last: Any = None
        self.read: Any = None
        self.returned, self.steps, self.max_steps, self.reported = 0.0, 0, 0, False

    def reset(self, seed: int, max_steps: int) -> None:
        """Begins an episode that is truncated after so many steps."""
        if self.flags["lost"]:
            with suppress(Exception, SystemExit):  # it may be broken
                self.env.close()
            self._renew()
        BEGUN[self.maker.name] += 1
        self.flags = dict.fromkeys(FLAGS, False)
        self.returned, self.steps, self.max_steps, self.reported = 0.0, 0, max_steps, False
        try:
            self._see(began(self.env, seed=seed)[0])
        except (Exception, SystemExit) as error:
            if self.read is None:
                raise _no_reset(self.maker.name, error) from error
            self._lose(error)

    def step(self, action: Any) -> float:
        """Takes an action and returns the reward."""
        if self.ended:
            return 0.0
        space = self.env.action_space
        try:
            if isinstance(space, spaces.Box):
                action = np.clip(action, space.low, space.high)
            observation, reward, terminated, truncated, info = stepped(self.env, fitted(space, action, "the action"))
            self._see(observation)
        except (Exception, SystemExit) as error:
            self._lose(error)
            return 0.0
        self.returned, self.steps = self.returned + reward, self.steps + 1
        truncated = (truncated or self.steps >= self.max_steps) and not terminated
        self.flags |= {"terminated": terminated, "truncated": truncated}
        self.flags["success"] = self._success(info, reward)
        if self.ended and not self.reported and self.maker.success_return is None:
            tell_doubtful_success(self.maker.name, self.flags["success"], self.steps, self.returned, reward)
        return reward

    @property
    def ended(self) -> bool:
        """Whether the episode has."""
        return self.flags["terminated"] or self.flags["truncated"]

    def close(self) -> None:
        with suppress(Exception, SystemExit):  # nothing is lost by it any more
            self.env.close()

    def _renew(self) -> None:
        self.env = self.maker.make()
        self.readable = readable(self.env.observation_space)

    def _see(self, observation: Any) -> None:
        self.read = observed(self.env.observation_space, self.readable, observation)
        self.last = observation

    def _lose(self, error: BaseException) -> None:
        self.flags |= {"truncated": True, "success": False, "lost": True}
        tell_lost(self.maker.name, error)

    def _success(self, info: dict[str, Any], reward: float) -> bool:
        for name in ("success", "is_success"):
            if name in info:
                self.reported = True
                return bool(np.all(info[name]))
        if self.reported:
            return self.flags["success"]
        if self.maker.success_return is not None:
            return self.returned >= self.maker.success_return
        return self.flags["terminated"] and reward > 0
