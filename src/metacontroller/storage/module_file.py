"""Saving a module and its constructor's arguments in one safetensors file; loading runs no code from the file."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from metacontroller.errors import UserError
from metacontroller.storage.files import replacing
from metacontroller.storage.training_state import check_finite, not_finite

Module = TypeVar("Module", bound="Saveable")
SAVE_FORMAT = "1"
_HEADER = "metacontroller"
"""The only key of the file's metadata: with several, safetensors does not fix their order, and equal modules should
give equal files."""


class Saveable:
    """Mixin of an ``nn.Module``: ``save``, ``load``, ``init_and_load``. Call ``remember_arguments(locals())`` first in
    ``__init__``, right after ``super().__init__()``; arguments must be plain data (or dataclasses of plain data).

    unsaved: submodules that are not saved.
    """

    arguments: dict[str, Any]
    unsaved: ClassVar[tuple[str, ...]] = ()

    def remember_arguments(self, local: dict[str, Any]) -> None:
        """Stores the constructor's arguments for ``save``, after a round trip through JSON."""
        plain = {name: _plain(value) for name, value in local.items() if name not in ("self", "__class__")}
        self.arguments = json.loads(json.dumps(plain))

    def save(self, path: str | Path) -> None:
        """Writes weights and arguments to one file, atomically; UserError for weights that are not finite."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in _weights(self).items()}
        name = not_finite(tensors)
        if name is not None:
            raise UserError(f"{name} of this {type(self).__name__} is not finite; it is not saved to {path}.")
        header = {"format": SAVE_FORMAT, "class": type(self).__name__, "arguments": self.arguments}
        with replacing(Path(path)) as draft:
            save_file(tensors, draft, metadata={_HEADER: json.dumps(header)})

    def load(self, path: str | Path, strict: bool = True) -> None:
        """Reads weights into this module from a file of a module of the same class.

        strict: whether names must match one to one; shapes must match in any case. UserError if the file does not fit.
        """
        tensors, _ = _read(path, type(self).__name__)
        _fill(self, tensors, path, strict)

    @classmethod
    def init_and_load(cls: type[Module], path: str | Path, strict: bool = True) -> Module:
        """A new module with the arguments and weights of a file that ``save`` wrote; UserError for another file."""
        tensors, arguments = _read(path, cls.__name__)
        module = cls(**arguments)
        _fill(module, tensors, path, strict)
        return module


def _weights(module: Saveable) -> dict[str, Tensor]:
    state: dict[str, Tensor] = module.state_dict()  # type: ignore[attr-defined]
    return {name: value for name, value in state.items() if name.split(".")[0] not in module.unsaved}


def _fill(module: Saveable, tensors: dict[str, Tensor], path: str | Path, strict: bool) -> None:
    own = _weights(module)
    wrong = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if strict:
        wrong += own.keys() ^ tensors.keys()
    if wrong:
        raise UserError(
            f"{path} does not fit this {type(module).__name__}: {len(wrong)} names or shapes differ, such as "
            f"{min(wrong)!r}; use `init_and_load` to make a module with the file's own arguments."
        )
    module.load_state_dict(tensors, strict=False)  # type: ignore[attr-defined]


def _read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; give a file that `save` wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); give a file that `save` wrote."
        ) from None
    if header.get("format") != SAVE_FORMAT or header.get("class") != kind:
        raise UserError(
            f"{path} holds a {header.get('class')!r} of format {header.get('format')!r}; "
            f"expected {kind!r} of format {SAVE_FORMAT!r}."
        )
    check_finite(tensors, str(path))
    return tensors, header["arguments"]


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
