"""Saving a module with the arguments that made it: one safetensors file; loading runs no code of the file's author."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file

Module = TypeVar("Module", bound="Saveable")
SAVE_FORMAT = "1"


class Saveable:
    """Mixin of an ``nn.Module``: ``save``, ``load``, ``init_and_load``. Call ``remember_arguments(locals())`` first in
    ``__init__``, right after ``super().__init__()``; arguments must be plain data (or dataclasses of plain data)."""

    arguments: dict[str, Any]

    def remember_arguments(self, local: dict[str, Any]) -> None:
        """Keeps the constructor's arguments for ``save``."""
        self.arguments = {name: _plain(value) for name, value in local.items() if name not in ("self", "__class__")}

    def save(self, path: str | Path) -> None:
        """Writes weights and arguments to one file, replaced only when the new one is whole."""
        target = Path(path)
        draft = target.with_name(f".{target.name}.tmp")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}  # type: ignore[attr-defined]
        metadata = {"format": SAVE_FORMAT, "class": type(self).__name__, "arguments": json.dumps(self.arguments)}
        save_file(tensors, draft, metadata=metadata)
        os.replace(draft, target)

    def load(self, path: str | Path, strict: bool = True) -> None:
        """Reads weights into this module; the file must come from a module of the same class."""
        tensors, _ = _read(path, type(self).__name__)
        self.load_state_dict(tensors, strict=strict)  # type: ignore[attr-defined]

    @classmethod
    def init_and_load(cls: type[Module], path: str | Path, strict: bool = True) -> Module:
        """A new module with the arguments and weights of a file that ``save`` wrote."""
        tensors, arguments = _read(path, cls.__name__)
        module = cls(**arguments)
        module.load_state_dict(tensors, strict=strict)  # type: ignore[attr-defined]
        return module


def _read(path: str | Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; give a file that `save` wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); give a file that `save` wrote.") from None
    if metadata.get("format") != SAVE_FORMAT or metadata.get("class") != name:
        raise ValueError(
            f"{path} holds a {metadata.get('class')!r} of format {metadata.get('format')!r}; expected {name!r}, {SAVE_FORMAT!r}."
        )
    return tensors, json.loads(metadata["arguments"])


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
