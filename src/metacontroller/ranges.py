"""What fields of configs and arguments may be, and the one sentence that refuses all else.

The kind of a value stands where it is declared, and one call checks it:

    @dataclass(frozen=True)
    class TrainConfig:
        steps: Count = 1000
        lr: Positive = 3e-4
        dropout: Annotated[float, Number(0, 1, below=True)] = 0.0
        max_norm: Positive | None = None
        view: Literal["front", "top"] = "front"
        alphas: tuple[NotNegative, ...] = ()

        def __post_init__(self) -> None:
            check_fields(self)
            require(self.steps % 10 == 0, "steps", self.steps, "a multiple of 10")

    @checked_kinds
    def train(config: TrainConfig, model: SteerableModel, *, workers: Processes = 1) -> None: ...

`arguments.checked_kinds` reads the annotations of a function as `check_fields` reads those of a config. Where a value
is neither: ``check(name, value, kind)``; for tensors: `tensors.check_tensor`. What checked code calls checks nothing
again.

NaN, infinity, a fraction where whole numbers are meant, and True or False where numbers are meant are always refused.
The upper bounds are far above any sane use: they turn what would hang or exhaust the memory into a sentence.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cache
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

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
            if self.above == self.below:
                return f"a {self.noun} between {self.least:g} and {self.most:g}"
            return f"a {self.noun} above {self.least:g}, at most {self.most:g}"
        if self.least > -math.inf:
            return f"a {self.noun} {'above' if self.above else 'of at least'} {self.least:g}"
        return f"a finite {self.noun}"


class Rising(NamedTuple):
    """Two whole numbers (from, to), 0 <= from <= to."""

    none: bool = False

    def expected(self, value: Any) -> str | None:
        """What was expected instead of a value; None if it is such a pair."""
        pair = isinstance(value, (tuple, list)) and len(value) == 2
        if pair and not any(Whole(0).expected(step) for step in value) and value[0] <= value[1]:
            return None
        return "(from, to), whole numbers with 0 <= from <= to"


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

Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, NOT_NEGATIVE]
Probability = Annotated[float, PROBABILITY]
Share = Annotated[float, SHARE]
Count = Annotated[int, COUNT]
CountOr0 = Annotated[int, Whole(0)]
Rows = Annotated[int, ROWS]
RowsOr0 = Annotated[int, Whole(0, MOST_ROWS)]
Width = Annotated[int, WIDTH]
WidthOr0 = Annotated[int, Whole(0, MOST_WIDTH)]
Depth = Annotated[int, DEPTH]
DepthOr0 = Annotated[int, Whole(0, MOST_DEPTH)]
Steps = Annotated[int, Whole(most=MOST_STEPS)]
Seed = Annotated[int, SEED]
Processes = Annotated[int, PROCESSES]
ProcessesOr0 = Annotated[int, Whole(0, MOST_PROCESSES)]
Warmup = Annotated[tuple[int, int], Rising()]

PLAIN: dict[Any, Any] = {int: Whole(-MOST_COUNT), float: Number()}
"""What a number without a range of its own may be."""
_NAMES: dict[Any, str] = {str: "a text", Callable: "a function", bool: "True or False"}
_REPRESENTED = (str, int, float, bool, type(None), list, tuple, dict)


def check(name: str, value: Any, kind: Any) -> None:
    """UserError that names ``name``, the value and what was expected, unless the value is of the kind.

    kind: an annotation (a class, `Annotated` with a range, a union, `Literal`, a tuple or list of kinds) or a range.
    """
    refused = _refused(name, value, kind)
    if refused is not None:
        place, entry, expected = refused
        require(False, place, entry, expected)


def check_fields(config: Any, **allowed: Any) -> None:
    """`check` of all fields of a config by their annotations, or of those named, each by its kind."""
    for name, kind in (allowed or _hints(type(config))).items():
        check(name, getattr(config, name), kind)


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """UserError "<name> is <value>; expected <expected>." unless the condition holds."""
    if not condition:
        said = shown(value) if isinstance(value, _REPRESENTED) else f"a {type(value).__name__}"
        raise UserError(f"{name} is {said}; expected {expected}.")


def _refused(name: str, value: Any, kind: Any) -> tuple[str, Any, str] | None:
    """The place of what is not of the kind, what stands there, and what was expected; None if nothing is wrong."""
    kind = PLAIN.get(kind, kind) if isinstance(kind, type) else kind
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, (Whole, Number, Rising)):
        expected = None if kind.none and value is None else kind.expected(value)
        return None if expected is None else (name, value, f"{expected}{', or none' * kind.none}")
    if origin is Annotated:
        ranges = [part for part in kind.__metadata__ if isinstance(part, (Whole, Number, Rising))]
        return _refused(name, value, *(ranges or parts[:1]))
    if origin in (Union, types.UnionType):
        return _refused_by_all(name, value, parts)
    if origin is Literal:
        known = isinstance(value, (str, int)) and value in parts
        return None if known else (name, value, f"one of {', '.join(map(repr, parts))}")
    if origin in (tuple, list, Sequence):
        return _refused_entry(name, value, origin, parts)
    kind = origin or kind
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False) or isinstance(value, kind):
        return None
    return name, value, _NAMES.get(kind, kind.__name__)


def _refused_by_all(name: str, value: Any, kinds: Sequence[Any]) -> tuple[str, Any, str] | None:
    if value is None and types.NoneType in kinds:
        return None
    refused = [_refused(name, value, kind) for kind in kinds if kind is not types.NoneType]
    known = [each for each in refused if each is not None]
    if len(known) < len(refused):
        return None
    place, entry, _ = max(known, key=lambda each: len(each[0]))  # an entry of a list rather than the list
    expected = " or ".join(each[2] for each in known if each[0] == place)
    return place, entry, f"{expected}{', or none' * (types.NoneType in kinds)}"


def _refused_entry(name: str, value: Any, origin: Any, kinds: Sequence[Any]) -> tuple[str, Any, str] | None:
    """Of a tuple or list with the kinds of its entries."""
    if isinstance(value, str) or not isinstance(value, Sequence if origin is Sequence else (tuple, list)):
        return name, value, "a list"
    if origin is not tuple or Ellipsis in kinds:
        kinds = [kinds[0]] * len(value)
    if len(value) != len(kinds):
        return name, value, f"{len(kinds)} entries"
    entries = (_refused(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(value, kinds, strict=True)))
    return next((entry for entry in entries if entry is not None), None)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def check_number(name: str, value: Any, allowed: Whole | Number) -> None:
    """`check` of a number."""
    check(name, value, allowed)


def check_each(name: str, values: Any, allowed: Whole | Number) -> None:
    """`check` of every entry of a tuple or list."""
    for index, value in enumerate(values):
        check(f"{name}[{index}]", value, allowed)


def check_warmup(name: str, between: Any) -> None:
    """UserError unless ``between`` is (from, to), whole numbers with 0 <= from <= to."""
    check(name, between, Rising())


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """UserError unless the value is one of a few names."""
    check(name, value, Literal[tuple(choices)])


def check_options(name: str, options: Any, kind: Callable[..., Any], given: Container[str] = ()) -> None:
    """UserError unless ``options`` is a mapping with the keywords that ``kind`` takes, and all that it needs.

    name: of the argument that holds them. given: keywords that are passed besides.
    """
    require(isinstance(options, Mapping), name, options, "a dict of options")
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
