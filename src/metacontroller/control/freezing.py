"""Groups of a metacontroller's parameters, and phases that train one and truly freeze the others."""

from __future__ import annotations

from typing import Any

from torch import nn

from metacontroller.models.protocol import linear_weights


class ParameterGroups:
    """Mixin of `MetaController`. Discovery trains all but the policy, internal RL the policy alone."""

    history: Any
    encoder: Any
    sequence_embedder: Any
    controller: Any
    policy: Any
    switching: Any

    def discovery_parameters(self) -> list[nn.Parameter]:
        """The parameters that discovery trains: all but the policy's."""
        return _without(self, self.policy)

    def matrices(self) -> list[nn.Parameter]:
        """Those that Muon may train: the weights of history, sequence embedder, encoder and gate, and those of a full
        controller, one matrix a hidden unit."""
        parts = (self.sequence_embedder, self.encoder, self.switching)
        weights = [weight for part in parts for weight in linear_weights(part)]
        history = [weight for weight in self.history.parameters() if weight.dim() == 2]
        controller = [] if self.controller.rank is not None else [self.controller.full]
        return [*history, *weights, *controller]

    def internal_rl_parameters(self) -> list[nn.Parameter]:
        """The parameters that internal RL trains: the policy's."""
        return list(self.policy.parameters())

    def discovery_parameters_switching_unit(self) -> list[nn.Parameter]:
        """Those of the gate."""
        return list(self.switching.parameters())

    def discovery_parameters_non_switching(self) -> list[nn.Parameter]:
        """Those that discovery trains, without the gate's."""
        return _without(self, self.policy, self.switching)

    def train_discovery(self) -> None:
        """Training mode; all but the policy requires a gradient."""
        self.train()  # pyright: ignore[reportAttributeAccessIssue] - of nn.Module
        trains_only(self, self.discovery_parameters())

    def train_internal_rl(self, eval_rest: bool = False) -> None:
        """Training mode of the policy, which alone requires a gradient; eval_rest: evaluation mode of all else."""
        if eval_rest:
            self.eval()  # pyright: ignore[reportAttributeAccessIssue] - of nn.Module
        self.policy.train()
        trains_only(self, self.internal_rl_parameters())


def trains_only(module: Any, parameters: list[nn.Parameter]) -> None:
    """Of a module's parameters, only the given ones require a gradient, until `thaw`."""
    kept = {id(parameter) for parameter in parameters}
    frozen = {value for value in module.parameters() if value.requires_grad and id(value) not in kept}
    module.frozen = frozen | getattr(module, "frozen", set())
    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def thaw(module: Any) -> None:
    """What `trains_only` froze requires a gradient again."""
    for parameter in vars(module).pop("frozen", ()):
        parameter.requires_grad_(True)


def _without(module: Any, *parts: nn.Module) -> list[nn.Parameter]:
    left_out = {id(parameter) for part in parts for parameter in part.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in left_out]
