"""Saving a module and its constructor's arguments in one safetensors file; loading runs no code from the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.storage.files import plain
from metacontroller.storage.manifest import replacing
from metacontroller.storage.tensor_file import not_finite, read_tensors, write_tensors

Module = TypeVar("Module", bound="Saveable")
SAVE_FORMAT = "2"


class Saveable:
    """Mixin of an ``nn.Module``: ``save``, ``load``, ``init_and_load``. Call ``remember_arguments(locals())`` first in
    ``__init__``, right after ``super().__init__()``; arguments must be plain data (or dataclasses of plain data).

    unsaved: submodules that are not saved. versions: the record of what it learned from, see `storage.versions`.
    """

    arguments: dict[str, Any]
    handed_modules: list[str]
    versions: dict[str, str]
    unsaved: ClassVar[tuple[str, ...]] = ()

    def remember_arguments(self, local: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
        """Stores the constructor's arguments for ``save``, after a round trip through JSON.

        A module among them, which no file can name, is left out, and ``save`` then refuses. optional: arguments that
        are left out where they have these values, their defaults.
        """
        given = {name: value for name, value in local.items() if name not in ("self", "__class__")}
        for name, default in (optional or {}).items():
            if given[name] == default:
                del given[name]
        self.handed_modules = sorted(name for name, value in given.items() if isinstance(value, nn.Module))
        data = {name: value for name, value in given.items() if name not in self.handed_modules}
        self.arguments = json.loads(json.dumps(data, default=plain))
        self.versions = {}

    def save(self, path: str | Path) -> None:
        """Writes weights and arguments to one file, atomically.

        UserError if the constructor was handed modules, and for weights that are not finite.
        """
        kind, tensors = type(self).__name__, _weights(self)
        if self.handed_modules:
            raise UserError(
                f"this {kind} was handed modules ({', '.join(self.handed_modules)}), which a file cannot hold; save "
                "its state_dict, and make it anew yourself."
            )
        name = not_finite(tensors)
        if name is not None:
            raise UserError(f"{name} of this {kind} is not finite; it is not saved to {path}.")
        header = {"format": SAVE_FORMAT, "class": kind, "arguments": self.arguments}
        if self.versions:
            header["versions"] = self.versions
        header["sha256"] = _digest(tensors, header)
        with replacing(Path(path)) as draft:
            write_tensors(draft, tensors, header)

    def load(self, path: str | Path, strict: bool = True) -> None:
        """Reads weights into this module from a file of a module of the same class.

        strict: whether names must match one to one; shapes must match in any case. UserError if the file does not fit.
        """
        tensors, _ = _read(Path(path), type(self).__name__)
        _fill(self, tensors, path, strict)

    @classmethod
    def init_and_load(cls: type[Module], path: str | Path, strict: bool = True) -> Module:
        """A new module with the arguments and weights of a file that ``save`` wrote; UserError for another file."""
        tensors, header = _read(Path(path), cls.__name__)
        module = _built(cls, tensors, header["arguments"], Path(path)) if strict else cls(**header["arguments"])
        types = {value.dtype for value in tensors.values() if value.is_floating_point()}
        if len(types) == 1:  # as `Module.double` and its like make it
            module.to(types.pop())  # type: ignore[attr-defined]
        module.versions = header.get("versions", {})
        _fill(module, tensors, path, strict)
        return module


def _weights(module: Saveable) -> dict[str, Tensor]:
    state: dict[str, Tensor] = module.state_dict()  # type: ignore[attr-defined]
    return {name: value for name, value in state.items() if name.split(".")[0] not in module.unsaved}


def _fill(module: Saveable, tensors: dict[str, Tensor], path: str | Path, strict: bool) -> None:
    expected = {name: (value.shape, value.dtype) for name, value in _weights(module).items()}
    actual = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    wrong = [name for name in expected.keys() & actual.keys() if expected[name] != actual[name]]
    if strict:
        wrong += expected.keys() ^ actual.keys()
    if wrong:
        raise UserError(
            f"{path} does not fit this {type(module).__name__}: {len(wrong)} names, shapes or types differ, such as "
            f"{min(wrong)!r}; use `init_and_load` to make a module with the file's own arguments."
        )
    module.load_state_dict(tensors, strict=False)  # type: ignore[attr-defined]


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file that `save` wrote.")
    tensors, header = read_tensors(path)
    if header.get("format") != SAVE_FORMAT or header.get("class") != kind:
        raise UserError(
            f"{path} holds a {header.get('class')!r} of format {header.get('format')!r}; "
            f"expected {kind!r} of format {SAVE_FORMAT!r}."
        )
    if not isinstance(header.get("arguments"), dict) or header.get("sha256") != _digest(tensors, header):
        raise UserError(f"{path} is not what `save` wrote (its SHA-256 differs); take another copy.")
    return tensors, header


def _digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """SHA-256 of all that a file says: it may lie where no manifest lists it."""
    content = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _built(kind: type[Module], tensors: dict[str, Tensor], arguments: dict[str, Any], path: Path) -> Module:
    """A new module; before it takes any memory or time, its arguments are compared with what the file holds, as far as
    that can be done without computing with values."""
    size = path.stat().st_size
    for name, value in _numbers(arguments):
        if abs(value) > size or ("depth" in name and value > len(tensors)):
            raise UserError(f"{path} says {name} {value}, which its {size} bytes cannot hold; take another copy.")
    actual = shapes = {name: value.shape for name, value in tensors.items()}
    try:
        with suppress(RuntimeError), torch.random.fork_rng(devices=[]), torch.device("meta"):
            shapes = {name: value.shape for name, value in _weights(kind(**arguments)).items()}
        if shapes != actual:
            raise UserError(f"{path} holds other weights than its arguments say; take another copy.")
        return kind(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} has arguments that make no {kind.__name__}: {error}; take another copy.") from error


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers of JSON data, with their names."""
    if isinstance(value, int):
        yield name, value
    for key, entry in value.items() if isinstance(value, dict) else ():
        yield from _numbers(entry, key)
    for entry in value if isinstance(value, list) else ():
        yield from _numbers(entry, name)
