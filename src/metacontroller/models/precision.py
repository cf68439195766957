"""Precision of matrix products: bfloat16 where the device is faster in it. All else stays in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from metacontroller.ranges import check

Precision = Literal["float32", "bfloat16", "auto"]


def check_precision(precision: str) -> None:
    """UserError unless ``precision`` is a `Precision`."""
    check("precision", precision, Precision)


def products(precision: Precision, x: Tensor) -> AbstractContextManager[object]:
    """Context in which x and float32 weights are multiplied in a precision; the residual stream stays in float32.

    "float32" changes nothing, so that the caller's autocast stays in force. "auto" is "bfloat16" on a device that
    prefers it, whatever the size of x: a row gives the same result in any batch, and the log-probabilities that
    reinforcement learning compares come from the same arithmetic.
    """
    kind = x.device.type
    if precision == "bfloat16" or (precision == "auto" and prefers_bfloat16(kind)):
        return torch.autocast(kind, torch.bfloat16)
    return nullcontext()


@contextmanager
def weights_cast_once() -> Iterator[None]:
    """Context in which `products` casts each weight once instead of at every product; weights must not change within.

    For acting, where with few rows casting the weights costs more than the product.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


@cache
def prefers_bfloat16(device_type: str) -> bool:
    """Whether a device type has instructions for products in bfloat16.

    CPUs with them are 2 (AVX512 of AMD) to 10 times (AMX) faster than in float32, others a hundred times slower
    (docs/log.md, 40). With AVX512 of Intel, without AMX, they take 1.5 times as long (84).
    """
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    intel = "Intel" in str(capabilities.get("cpu_name", ""))
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not intel))
