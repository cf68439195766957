"""What tensors in arguments may be, and the sentences that refuse all else.

    check_tensor("state", state, ("batch", "time", 5), torch.int64, "the cell of each object, then the agent's")
    check_entries("state", state, 0, cells - 1)

Shapes and types are compared without waiting for a device; entries are read, which waits.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from metacontroller.errors import UserError

Axes = tuple["int | str | EllipsisType", ...]
"""A shape: a size, a name for any size of at least 1, or at one place ... for any further axes."""


def check_tensor(
    name: str,
    value: Any,
    shape: Axes | None = None,
    dtype: torch.dtype | type | None = None,
    what: str = "",
    *,
    none: bool = False,
) -> None:
    """UserError that names shape and type, and what was expected, unless the value is such a tensor.

    dtype: a type of PyTorch's, or float for any floating-point one, or int for any of whole numbers. what: the meaning
    of the axes, for the message. none: whether None is in it too.
    """
    if value is None and none:
        return
    if not isinstance(value, Tensor):
        article = "an" if type(value).__name__[0] in "aeiou" else "a"
        given = "None" if value is None else f"{article} {type(value).__name__}"
        raise UserError(f"{name} is {given}; expected a torch.Tensor, as torch.as_tensor makes of lists and arrays.")
    if (shape is None or _fits(value.shape, shape)) and (dtype is None or _is_of(value.dtype, dtype)):
        return
    kind = {None: "", float: "floating-point", int: "whole numbers"}.get(dtype, str(dtype).removeprefix("torch."))
    axes = "" if shape is None else f"({', '.join('...' if axis is ... else str(axis) for axis in shape)})"
    axes = axes.replace(")", ",)") if len(shape or ()) == 1 else axes
    expected = " ".join(filter(None, ("a non-empty" * (0 in value.shape), kind, axes)))
    given = f"shape {tuple(value.shape)}" + (f" and dtype {value.dtype}" if dtype is not None else "")
    raise UserError(f"{name} {_plural(name, 'have', 'has')} {given}; expected {expected}{what and ': '}{what}.")


def _fits(given: torch.Size, shape: Axes) -> bool:
    if ... in shape:
        before = shape.index(...)
        after = len(shape) - before - 1
        if len(given) < before + after:
            return False
        given, shape = given[:before] + given[len(given) - after :], shape[:before] + shape[before + 1 :]
    sizes = zip(given, shape, strict=False)
    return len(given) == len(shape) and all(
        size >= 1 if isinstance(axis, str) else size == axis for size, axis in sizes
    )


def _is_of(given: torch.dtype, dtype: torch.dtype | type) -> bool:
    if dtype is float:
        return given.is_floating_point
    if dtype is int:
        return not (given.is_floating_point or given.is_complex or given == torch.bool)
    return given == dtype


def check_entries(name: str, values: Tensor, least: float, most: float, what: str = "") -> None:
    """UserError that names the range of the entries unless all lie in least..most; NaN does not. Waits for the device.

    what: the meaning of the bounds, for the message.
    """
    if not values.numel():
        return
    if not values.numel():
        return
    low, high = values.min().item(), values.max().item()
    if not (least <= low and high <= most):
        ranges = _plural(name, "range", "ranges")
        raise UserError(f"{name} {ranges} over {low}..{high}; each must lie in {least}..{most}{what and ', '}{what}.")


def check_finite(name: str, values: Tensor) -> None:
    """UserError if an entry is NaN or infinite. Waits for the device."""
    if not bool(values.isfinite().all()):
        raise UserError(f"{name} {_plural(name, 'hold', 'holds')} NaN or infinite values; expected finite numbers.")


def check_rows(rows: Tensor, count: int) -> None:
    """UserError unless ``rows`` are indices, (m,) int64 with m of at least 1, of ``count`` episodes; their values are
    checked on the CPU only."""
    check_tensor("rows", rows, ("m",), torch.int64, "at least one index")
    if rows.device.type == "cpu":
        check_entries("rows", rows, 0, count - 1, "the episodes at hand")


def check_lengths(
    lengths: Tensor | None, batch: int, steps: int, name: str = "episode_lens", *, wait: bool = True
) -> None:
    """UserError unless ``lengths`` is None or holds ``batch`` whole numbers within 1..steps.

    With wait=False the values are checked on the CPU only, because reading them from another device would synchronize
    with it.
    """
    check_tensor(name, lengths, (batch,), int, "one an episode", none=True)
    if lengths is not None and (wait or lengths.device.type == "cpu"):
        check_entries(name, lengths, 1, steps, "the padded length")


def _plural(name: str, several: str, one: str) -> str:
    return several if name.endswith("s") else one
