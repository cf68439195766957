"""Versions and hardware that a result was made with."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from metacontroller.models.precision import prefers_bfloat16


def environment_facts() -> dict[str, Any]:
    """Versions and hardware that a result was made with; bfloat16: where precision "auto" multiplies in it."""
    versions = {name: _version(name) for name in ("metacontroller-rl", "torch", "numpy")}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "bfloat16": {device: prefers_bfloat16(device) for device in ("cpu", "cuda")},
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
