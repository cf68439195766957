"""Groups of a metacontroller's parameters, and phases that train one group and freeze the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from metacontroller.control.modules import SteeringModules
from metacontroller.models.protocol import frozen, linear_weights


def without(module: nn.Module, *parts: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module but those of some parts."""
    left_out = {id(parameter) for part in parts for parameter in part.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in left_out]


def matrices(modules: SteeringModules) -> list[nn.Parameter]:
    """Those that Muon may train: the weights of history, sequence embedder, encoder and gate, and those of a full
    controller, one matrix a hidden unit."""
    parts = (modules.sequence_embedder, modules.encoder, modules.switching)
    weights = [weight for part in parts for weight in linear_weights(part)]
    history = [weight for weight in modules.history.parameters() if weight.dim() == 2]
    controller = [] if modules.controller.rank is not None else [modules.controller.full]
    return [*history, *weights, *controller]


@contextmanager
def fixed_gate(modules: SteeringModules) -> Iterator[None]:
    """Context in which `discover` gives no gradient to anything that beta depends on, given residuals and codes: not to
    the gate, nor to norm and history, which it reads; the codes that the gate mixes have theirs."""
    with frozen(nn.ModuleList([modules.norm, modules.history, modules.switching])):
        yield


def trains_only(module: Any, parameters: list[nn.Parameter]) -> None:
    """Of a module's parameters, only the given ones require a gradient, until `thaw`."""
    trained = {id(parameter) for parameter in parameters}
    newly = {value for value in module.parameters() if value.requires_grad and id(value) not in trained}
    module.frozen = newly | getattr(module, "frozen", set())
    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def thaw(module: Any) -> None:
    """What `trains_only` froze requires a gradient again."""
    for parameter in vars(module).pop("frozen", ()):
        parameter.requires_grad_(True)
