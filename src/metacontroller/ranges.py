"""Ranges of numbers and names of options in configs and arguments, and the one sentence that refuses all else.

NaN, infinity, a fraction where whole numbers are meant, and True or False where numbers are meant are always refused.
The upper bounds are far above any sane use: they turn what would hang or exhaust the memory into a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any, NamedTuple

from metacontroller.errors import UserError

MOST_COUNT = 2**53
"""Of updates, episodes and steps: whole numbers up to there are exact in JSON."""
MOST_ROWS = 2**20
"""Of what is in memory side by side, such as the episodes of a batch."""
MOST_WIDTH = 2**16
"""Of units of a layer; a square matrix of them has 16 GiB."""
MOST_DEPTH = 1024
"""Of layers one after the other."""
MOST_PROCESSES = 1024
"""Of processes and threads on a machine."""
MOST_SIDE = 256
"""Of cells along the side of a world."""
MOST_STEPS = 10**6
"""Of an episode."""
MOST_SEED = 2**31 - 1
"""Of what a phase samples; those that derive from a run's seed are within."""


class Whole(NamedTuple):
    """Whole numbers from ``least`` to ``most``. none: whether None is in it too."""

    least: int = 1
    most: int = MOST_COUNT
    none: bool = False

    def expected(self, value: Any) -> str | None:
        """What was expected instead of a value; None if it is in the range."""
        if isinstance(value, bool) or not isinstance(value, Integral):
            return "a whole number" if self.least < 0 else f"a whole number of at least {self.least}"
        if int(value) < self.least:
            return f"at least {self.least}"
        return f"at most {self.most}" if int(value) > self.most else None


class Number(NamedTuple):
    """Finite numbers from ``least`` to ``most``. above: whether ``least`` itself is left out; below: ``most`` itself.
    none: whether None is in it too. noun: what such a number is."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    none: bool = False
    noun: str = "number"

    def expected(self, value: Any) -> str | None:
        """What was expected instead of a value; None if it is in the range."""
        number = _real(value)
        if math.isfinite(number):
            low = self.least < number if self.above else self.least <= number
            high = number < self.most if self.below else number <= self.most
            if low and high:
                return None
        if self.most < math.inf:
            if (not self.above and not self.below) or (self.above and self.below):
                return f"a {self.noun} between {self.least:g} and {self.most:g}"
            return f"a {self.noun} above {self.least:g}, at most {self.most:g}"
        if self.least > -math.inf:
            return f"a {self.noun} {'above' if self.above else 'of at least'} {self.least:g}"
        return f"a finite {self.noun}"


def _real(value: Any) -> float:
    """A number as a float, infinite where it is too large for one; NaN for all else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


POSITIVE = Number(0, above=True)
NOT_NEGATIVE = Number(0)
PROBABILITY = Number(0, 1, noun="probability")
SHARE = Number(0, 1, noun="share")
COUNT, ROWS, WIDTH, DEPTH = Whole(), Whole(most=MOST_ROWS), Whole(most=MOST_WIDTH), Whole(most=MOST_DEPTH)
SEED, PROCESSES = Whole(0, MOST_SEED), Whole(most=MOST_PROCESSES)


def check_number(name: str, value: Any, allowed: Whole | Number) -> None:
    """UserError that names ``name``, the value and what was expected, unless the value is in the range."""
    expected = None if allowed.none and value is None else allowed.expected(value)
    if expected is not None:
        raise UserError(f"{name} is {shown(value)}; expected {expected}{', or none' * allowed.none}.")


def check_fields(config: Any, **allowed: Whole | Number) -> None:
    """`check_number` of fields of a config, by name."""
    for name, limits in allowed.items():
        check_number(name, getattr(config, name), limits)


def check_each(name: str, values: Any, allowed: Whole | Number) -> None:
    """`check_number` of every entry of a tuple or list."""
    for index, value in enumerate(values):
        check_number(f"{name}[{index}]", value, allowed)


def check_warmup(name: str, between: Any) -> None:
    """UserError unless ``between`` is (from, to), whole numbers with 0 <= from <= to."""
    whole = isinstance(between, (tuple, list)) and len(between) == 2
    if not whole or any(Whole(0).expected(step) for step in between) or between[0] > between[1]:
        raise UserError(f"{name} is {shown(between)}; expected (from, to), whole numbers with 0 <= from <= to.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """UserError unless the value is one of a few names."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} is {shown(value)}; expected one of {', '.join(map(repr, choices))}.")


def check_options(name: str, options: Any, kind: Callable[..., Any], given: Container[str] = ()) -> None:
    """UserError unless ``options`` is a mapping with the keywords that ``kind`` takes, and all that it needs.

    name: of the argument that holds them. given: keywords that are passed besides.
    """
    if not isinstance(options, Mapping):
        raise UserError(f"{name} is {shown(options)}; expected a dict of options.")
    known = {key: part for key, part in signature(kind).parameters.items() if key not in given and key != "self"}
    unknown = sorted(str(option) for option in options if option not in known)
    if unknown:
        raise UserError(f"{name} has an unknown option {unknown[0]!r}; expected {', '.join(known)}.")
    missing = [key for key, part in known.items() if part.default is Parameter.empty and key not in options]
    if missing:
        raise UserError(f"{name} is {shown(dict(options))} and lacks {missing[0]!r}; expected {', '.join(known)}.")


def shown(value: Any) -> str:
    """A value as a message names it: never more than a line of it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
