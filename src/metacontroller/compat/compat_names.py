"""What the adapter's classes share: attributes under other names, and their way to save."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

from metacontroller.control.parameter_groups import thaw
from metacontroller.errors import UserError
from metacontroller.storage.module_file import Saveable


def other_name(path: str) -> Any:
    """A property that reads and sets the attribute at ``path``, such as "loss_weights.kl"."""
    *parts, last = path.split(".")

    def read(self: Any) -> Any:
        return getattr(reduce(getattr, parts, self), last)

    def write(self: Any, value: Any) -> None:
        setattr(reduce(getattr, parts, self), last, value)

    return property(read, write, doc=f"Our ``{path}``.")


class TheirTraining:
    """Mixin: ``train()`` undoes what a phase has frozen. Theirs freeze nothing, so that scripts take turns by it."""

    def train(self, mode: bool = True) -> Any:
        """As of ``nn.Module``."""
        if mode:
            thaw(self)
        return super().train(mode)  # pyright: ignore[reportAttributeAccessIssue] - of nn.Module


class TheirSave(Saveable):
    """Mixin: ``save`` with their argument ``overwrite``."""

    def save(self, path: str | Path, overwrite: bool = True) -> None:
        """As of `Saveable`; UserError where the file exists and is not to be overwritten."""
        if not overwrite and Path(path).exists():
            raise UserError(f"{path} exists and overwrite is False; choose another path.")
        super().save(path)
