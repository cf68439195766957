"""The content of a checkpoint: a module, its optimizer and its rng as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.errors import UserError


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers under '<prefix>.<name>'."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Load what `module_tensors` returned; UserError names the first missing, unexpected or misshapen tensor."""
    state = _under(prefix, tensors)
    expected = module.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        lacks = "checkpoint" if name in expected else "model"
        raise UserError(f"The {lacks} has no tensor {prefix}.{name}; build the model from the checkpoint's config.")
    for name, tensor in state.items():
        _check_shape(f"{prefix}.{name}", tensor, expected[name])
    module.load_state_dict(state)


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state (for AdamW: step, exp_avg, exp_avg_sq) under '<prefix>.<parameter index>.<name>'."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def optimizer_meta(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state that is not in `optimizer_tensors`, for `meta`: settings of the parameter groups."""
    content = optimizer.state_dict()
    return {"param_groups": content["param_groups"], "parameters_with_state": len(content["state"])}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], prefix: str
) -> None:
    """Restore `optimizer_tensors` and `optimizer_meta`, so that training resumes exactly; UserError on a mismatch."""
    groups = [_with_tuples(group) for group in meta["param_groups"]]
    sizes, expected = ([len(group["params"]) for group in each] for each in (groups, optimizer.param_groups))
    if sizes != expected:
        raise UserError(f"The checkpoint's optimizer has {sizes} parameters a group where this one has {expected}.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _under(prefix, tensors).items():
        index, name = key.split(".", 1)
        if tensor.ndim:  # `step` is a scalar; all else is shaped like its parameter
            _check_shape(f"{prefix}.{key}", tensor, parameters[int(index)])
        state.setdefault(int(index), {})[name] = tensor
    count = meta["parameters_with_state"]
    if len(state) != count or len({frozenset(values) for values in state.values()}) > 1:
        raise UserError(
            f"The checkpoint has optimizer state of {len(state)} parameters under {prefix!r} where {count} were "
            "expected, each with the same tensors; give the prefix it was saved under, or take an older one."
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _check_shape(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise UserError(
            f"Tensor {name} of the checkpoint has shape {tuple(tensor.shape)} where {tuple(expected.shape)} was "
            "expected; build the model from the checkpoint's config."
        )
    if tensor.dtype != expected.dtype:
        raise UserError(f"Tensor {name} of the checkpoint is of {tensor.dtype} where {expected.dtype} was expected.")


def _with_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """Convert lists back to the tuples that JSON cannot hold, except the list of parameters."""
    return {key: tuple(v) if isinstance(v, list) and key != "params" else v for key, v in group.items()}
