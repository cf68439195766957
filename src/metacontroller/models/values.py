"""What observations and actions have in common: categories, and the statistics by which numbers are standardized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metacontroller.ranges import require
from metacontroller.tensors import check_entries, check_finite, check_tensor


def check_values(
    name: str, values: Tensor, shape: tuple[int, ...], dtype: torch.dtype, sizes: Sequence[int], contents: str = ""
) -> None:
    """UserError unless ``values`` have that shape and type, for floats any precision, and are finite; waits for the
    device. sizes: numbers of categories of the first entries of the last axis."""
    check_tensor(name, values, shape, float if dtype.is_floating_point else dtype, contents)
    if dtype.is_floating_point:
        check_finite(name, values)
    if not sizes:
        return
    entries = values if len(shape) > 2 else values[..., None]
    chosen = entries[..., : len(sizes)].flatten(0, -2)
    wrong = (chosen < 0) | (chosen >= chosen.new_tensor(sizes))
    if dtype.is_floating_point:
        wrong |= chosen != chosen.round()
    if bool(wrong.any()):
        entry = int(wrong.any(0).nonzero()[0])
        name = name if len(sizes) == 1 else f"{name}[..., {entry}]"
        check_entries(name, chosen[:, entry], 0, sizes[entry] - 1)
        require(False, name, float(chosen[wrong[:, entry], entry][0]), "whole numbers")


def block_starts(sizes: Sequence[int]) -> Tensor:
    """Where each of several blocks that lie one after the other begins, (k,) int64."""
    return torch.tensor([0, *sizes[:-1]]).cumsum(0)


def register_statistics(
    module: nn.Module, size: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Gives a module the buffers ``mean`` and ``std`` (size,), both None without statistics.

    They are saved with the module's arguments. UserError for wrong sizes, and for standard deviations that are not
    positive.
    """
    for name, numbers in {"mean": mean, "std": std}.items():
        fits = (numbers is None) == (mean is None) and (numbers is None or len(numbers) == size)
        require(fits, name, numbers, f"{size} numbers, for mean and std both or neither")
        tensor = None if numbers is None else torch.tensor(numbers, dtype=torch.get_default_dtype())
        module.register_buffer(name, tensor, persistent=False)
    require(std is None or min(std) > 0, "std", std, "positive numbers")
