"""In which type matrices are multiplied: bfloat16 where the device is faster in it. All else stays in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from metacontroller.errors import UserError

Precision = Literal["float32", "bfloat16", "auto"]


def check_precision(precision: str) -> None:
    """Raises ValueError for what is no `Precision`."""
    if precision not in get_args(Precision):
        raise UserError(f"precision is {precision!r}; expected 'float32', 'bfloat16' or 'auto'.")


def products(precision: Precision, x: Tensor) -> AbstractContextManager[object]:
    """The context in which x and float32 matrices are multiplied as asked; what they add up to stays in float32.

    "float32" leaves things as they are, so that an autocast of the caller's holds. "auto" is "bfloat16" on a device
    that prefers it, see `prefers_bfloat16`: the size of x has no say, so that a row comes out alike in any batch and
    log-probabilities that reinforcement learning compares are of one arithmetic.
    """
    kind = x.device.type
    if precision == "bfloat16" or (precision == "auto" and prefers_bfloat16(kind)):
        return torch.autocast(kind, torch.bfloat16)
    return nullcontext()


@contextmanager
def weights_cast_once() -> Iterator[None]:
    """Context in which `products` cast each weight once and not at every product; weights must not change within.

    For acting, where an input of few rows is cheaper to multiply than its weights are to cast.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


@cache
def prefers_bfloat16(device_type: str) -> bool:
    """Whether a device has instructions for products in bfloat16: such CPUs are 2 (AVX512) to 10 times (AMX) faster in
    it than in float32, others a hundred times slower (docs/log.md, 40)."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
