"""In which type matrices are multiplied: bfloat16 where the device is faster in it. All else stays in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


LARGE = {"cpu": 2**16, "cuda": 0}
"""Entries from which on an input is worth a cast on the way to a product: 256 rows of 256, 512 of 128."""


def products(precision: Precision, x: Tensor) -> AbstractContextManager[object]:
    """The context in which x and float32 matrices are multiplied as asked; what they add up to stays in float32.

    "float32" leaves things as they are, so that an autocast of the caller's holds. "auto" is "bfloat16" for large
    inputs on a device that prefers it, see `prefers_bfloat16`.
    """
    kind = x.device.type
    if precision == "bfloat16" or (precision == "auto" and prefers_bfloat16(kind) and x.numel() >= LARGE[kind]):
        return torch.autocast(kind, torch.bfloat16)
    return nullcontext()


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
