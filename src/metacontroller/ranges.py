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
    """Whole numbers from ``least`` to ``most``."""

    least: int = 1
    most: int = MOST_COUNT

    def expected(self, value: Any) -> str | None:
        """What was expected instead of a value; None if it is in the range."""
        if isinstance(value, bool) or not isinstance(value, Integral):
            return "a whole number" if self.least < 0 else f"a whole number of at least {self.least}"
        if int(value) < self.least:
            return f"at least {self.least}"
        return f"at most {self.most}" if int(value) > self.most else None


class Number(NamedTuple):
    """Finite numbers from ``least`` to ``most``. above: whether ``least`` itself is left out; below: ``most`` itself.
    noun: what such a number is."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
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


class Rising:
    """Two whole numbers (from, to), 0 <= from <= to."""

    def expected(self, value: Any) -> str | None:
        """What was expected instead of a value; None if it is such a pair."""
        pair = isinstance(value, (tuple, list)) and len(value) == 2
        if pair and not any(Whole(0).expected(step) for step in value) and value[0] <= value[1]:
            return None
        return "(from, to), whole numbers with 0 <= from <= to"


RANGES = (Whole, Number, Rising)
LISTS = (tuple, list, Sequence)


def _real(value: Any) -> float:
    """A number as a float, infinite where it is too large for one; NaN for all else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


Positive = Annotated[float, Number(0, above=True)]
NotNegative = Annotated[float, Number(0)]
Probability = Annotated[float, Number(0, 1, noun="probability")]
Share = Annotated[float, Number(0, 1, noun="share")]
Count = Annotated[int, Whole()]
CountOr0 = Annotated[int, Whole(0)]
Rows = Annotated[int, Whole(most=MOST_ROWS)]
RowsOr0 = Annotated[int, Whole(0, MOST_ROWS)]
Width = Annotated[int, Whole(most=MOST_WIDTH)]
WidthOr0 = Annotated[int, Whole(0, MOST_WIDTH)]
Depth = Annotated[int, Whole(most=MOST_DEPTH)]
DepthOr0 = Annotated[int, Whole(0, MOST_DEPTH)]
Steps = Annotated[int, Whole(most=MOST_STEPS)]
Seed = Annotated[int, Whole(0, MOST_SEED)]
Processes = Annotated[int, Whole(most=MOST_PROCESSES)]
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
    kind = PLAIN.get(kind, kind) if isinstance(kind, type) else kind
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, RANGES):
        expected = kind.expected(value)
        require(expected is None, name, value, expected or "")
    elif origin is Annotated:
        ranges = [part for part in kind.__metadata__ if isinstance(part, RANGES)]
        check(name, value, *(ranges or parts[:1]))
    elif origin in (Union, types.UnionType):
        _check_any(name, value, parts)
    elif origin is Literal:
        known = isinstance(value, (str, int)) and value in parts
        require(known, name, value, f"one of {', '.join(map(repr, parts))}")
    elif origin in LISTS:
        _check_entries(name, value, origin, parts)
    else:
        kind = origin or kind
        if kind is not Any and isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
            require(isinstance(value, kind), name, value, _NAMES.get(kind, kind.__name__))


def _check_any(name: str, value: Any, kinds: Sequence[Any]) -> None:
    optional, errors = types.NoneType in kinds, []
    if value is None and optional:
        return None
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return check(name, value, kind)
            except UserError as error:
                errors.append(str(error).removesuffix("."))
    others = (error.partition("; expected ")[2] for error in errors[1:])
    raise UserError(f"{' or '.join([errors[0], *others])}{', or none' * optional}.")


def _check_entries(name: str, value: Any, origin: Any, kinds: Sequence[Any]) -> None:
    """Of a tuple or list with the kinds of its entries."""
    listed = isinstance(value, Sequence if origin is Sequence else (tuple, list)) and not isinstance(value, str)
    require(listed, name, value, "a list")
    if origin is not tuple or Ellipsis in kinds:
        kinds = [kinds[0]] * len(value)
    require(len(value) == len(kinds), name, value, f"{len(kinds)} entries")
    for index, (entry, kind) in enumerate(zip(value, kinds, strict=True)):
        check(f"{name}[{index}]", entry, kind)


def check_fields(config: Any, **allowed: Any) -> None:
    """`check` of all fields of a config by their annotations, or of those named, each by its kind."""
    for name, kind in (allowed or _hints(type(config))).items():
        check(name, getattr(config, name), kind)


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """UserError "<name> is <value>; expected <expected>." unless the condition holds."""
    if not condition:
        said = shown(value) if isinstance(value, _REPRESENTED) else f"a {type(value).__name__}"
        raise UserError(f"{name} is {said}; expected {expected}.")


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


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
