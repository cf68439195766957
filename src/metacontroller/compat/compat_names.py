"""What the adapter's modules share: keywords and attributes under other names, states, and the way to save."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metacontroller.control.parameter_groups import thaw
from metacontroller.errors import UserError
from metacontroller.storage.module_file import Saveable

Kind = TypeVar("Kind", bound=type)
BODY = {
    "attn_dim_head": "dim_head",
    "attn_heads": "heads",
    "pre_norm_has_final_norm": "final_norm",
    **{name: name for name in ("kind", "depth", "heads", "dim_head", "mlp_dim", "width", "final_norm")},
}
"""Options of bodies: theirs, or ours, to ours."""
IGNORED = {"polar_pos_emb", "rotary_pos_emb", "use_rmsnorm", "use_adaptive_rmsnorm", "attn_flash", "flash", "pool"}
"""Options of bodies that say how, not what: positions and norms are ours."""


def renamed(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Options under our names; what has no other name keeps its own."""
    return {names.get(name, name): value for name, value in options.items()}


def body_options(options: dict[str, Any], dim: int) -> dict[str, Any]:
    """Options of a body of width ``dim`` under our names; UserError for those that we do not have."""
    ours = renamed({name: value for name, value in options.items() if name not in IGNORED}, BODY)
    if ours.get("kind", "attention") == "attention" and dim % ours.get("heads", 4):
        ours.setdefault("dim_head", 64)
    if "ff_mult" in ours:
        ours["mlp_dim"] = int(ours.pop("ff_mult") * dim)
    unknown = sorted(ours.keys() - BODY.values())
    if unknown:
        known = ", ".join(sorted(set(BODY.values())))
        raise UserError(f"the body's option {unknown[0]!r} is unknown; known are {known}.")
    return ours


def states_as_entries(options: dict[str, Any]) -> dict[str, Any]:
    """A single choice as a list of one, as our encoder of choices takes it."""
    number = options.get("num_discrete")
    return {**options, "num_discrete": [number]} if isinstance(number, int) else options


def joined_states(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """States as one tensor (b, t, ...): a single choice (b, t) as (b, t, 1), choices and numbers side by side."""
    if not isinstance(state, Tensor):
        chosen, numbers = joined_states(state[0]), state[1]
        return torch.cat([chosen.to(numbers.dtype), numbers], -1)
    return state[..., None] if state.dim() == 2 and not state.is_floating_point() else state


def clamped_lengths(lengths: Tensor | None, steps: int) -> Tensor | None:
    """Lengths of at most ``steps``, with a warning where they were longer."""
    if lengths is None or int(lengths.max()) <= steps:
        return lengths
    warnings.warn(f"episode_lens hold {int(lengths.max())}, beyond the {steps} steps given; clamped.", stacklevel=3)
    return lengths.clamp_max(steps)


def on_device_of(module: nn.Module, *values: Any) -> list[Any]:
    """The tensors among the values on the module's device, the others as they are."""
    device = next(module.parameters()).device
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


def other_names(names: dict[str, str]) -> Callable[[Kind], Kind]:
    """Decorator: attributes of a class under other names, read and set at their paths, such as "loss_weights.kl"."""

    def decorated(kind: Kind) -> Kind:
        for name, path in names.items():
            if name != path:
                setattr(kind, name, _at(path))
        return kind

    return decorated


def _at(path: str) -> property:
    *parts, last = path.split(".")

    def write(self: Any, value: Any) -> None:
        setattr(reduce(getattr, parts, self), last, value)

    return property(lambda self: getattr(reduce(getattr, parts, self), last), write, doc=f"Our ``{path}``.")


class OtherNames(Saveable):
    """Mixin: attributes under other names can be set to modules, and a phase's freezing and overwriting are theirs."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets properties as such; ``nn.Module`` alone would register a module beside the property."""
        attribute = getattr(type(self), name, None)
        if isinstance(attribute, property):
            attribute.__set__(self, value)
        else:
            super().__setattr__(name, value)

    def remember_arguments(self, local: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
        """As of `Saveable`; each of the ``options`` counts, and what is not saved does not."""
        given = {**local, **local.get("options", {})}
        left_out = {"options", *self.unsaved}
        super().remember_arguments({name: given[name] for name in given if name not in left_out}, optional)

    def train(self, mode: bool = True) -> Any:
        """As of ``nn.Module``; undoes what a phase has frozen. Theirs freeze nothing: scripts take turns by it."""
        if mode:
            thaw(self)
        return super().train(mode)  # pyright: ignore[reportAttributeAccessIssue] - of nn.Module

    def save(self, path: str | Path, overwrite: bool = True) -> None:
        """As of `Saveable`; UserError where the file exists and is not to be overwritten."""
        if not overwrite and Path(path).exists():
            raise UserError(f"{path} exists and overwrite is False; choose another path.")
        super().save(path)
