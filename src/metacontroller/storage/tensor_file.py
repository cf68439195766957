"""Safetensors files: finite tensors, and a JSON object in the metadata. Reading runs no code from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metacontroller.errors import UserError
from metacontroller.ranges import shown
from metacontroller.storage.files import check_regular, parse_json, plain
from metacontroller.storage.manifest import verify

HEADER = "metacontroller"
"""The only key of a file's metadata: with several, safetensors does not fix their order, and equal content should give
equal files. Some kinds of files have another."""


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity; None if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None, key: str = HEADER
) -> None:
    """Writes copies on the CPU, because safetensors refuses tensors that share memory."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"the tensor {name} is {shown(tensor)}; expected a torch.Tensor.")
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(copies, path, metadata=None if header is None else {key: json.dumps(header, default=plain)})


def read_tensors(
    path: Path, device: str | torch.device = "cpu", key: str = HEADER
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote; UserError for another file, one that its run did not write so, and NaN in it."""
    with _opened(path, str(device)) as file:
        header = _header(path, file, key)
        verify(path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    name = not_finite(tensors)
    if name is not None:
        raise UserError(f"{path} holds NaN or infinite values in {name!r}; take one that was saved before.")
    return tensors, header


def read_header(path: Path) -> dict[str, Any]:
    """The JSON object that `write_tensors` wrote; UserError as `read_tensors`."""
    with _opened(path, "cpu") as file:
        verify(path)
        return _header(path, file, HEADER)


@contextmanager
def _opened(path: Path, device: str) -> Iterator[Any]:
    check_regular(path)
    incomplete = f"{path} is not a complete safetensors file; take another copy, or delete it and make it again."
    try:
        opened = safe_open(path, framework="pt", device=device)
    except Exception as error:  # MemoryError too: of a length that cannot be mapped
        raise UserError(incomplete) from error
    try:
        with opened as file:
            yield file
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:  # of safetensors or torch, whatever they make of a damaged file
        raise UserError(incomplete) from error


def _header(path: Path, file: Any, key: str) -> dict[str, Any]:
    text = (file.metadata() or {}).get(key)
    if text is None:
        raise UserError(f"{path} was not written by this library; name a file that a run or `save` has written.")
    try:
        header = parse_json(text, infinite=True)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} has a damaged header; take another copy, or delete it and make it again.")
    return header
