"""Policies over codes that read every step, not only switches: attention, GRU, minGRU, Hawk, MLP or any module.

The paper's policy reads the residual at switches alone (`control.policy`). A policy that reads every step gives a
distribution at every step from all residuals so far, so that stored episodes can be judged without their switches.
Axes: b batch, t steps, n_e residual, p parameters of a distribution of codes.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.kernels.linear_scan import linear_scan
from metacontroller.models.attention import AttentionBody
from metacontroller.models.caches import check_unused
from metacontroller.models.hawk import HawkBody
from metacontroller.ranges import check_choice

ProposerKind = Literal["attention", "gru", "mingru", "hawk", "mlp"]


class StepwisePolicy(nn.Module):
    """A proposer over all residuals and a linear map to distributions of codes, which starts at the prior (zeros).

    proposer: module(x, state) -> (b, t, n), next state; with ``keep`` the state is one to go on from. dim: n.
    """

    every_step = True

    def __init__(self, proposer: nn.Module, dim_model: int, params: int, *, dim: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim_model)
        self.proposer = proposer
        self.readout = nn.Linear(dim_model if dim is None else dim, params)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, residual: Tensor, state: Any = None, *, keep: bool = False) -> tuple[Tensor, Any]:
        """residual (b, t, n_e), which follows the steps of ``state`` -> distributions (b, t, p), next state, the
        proposer's and the number of steps so far.

        keep: whether the next state is needed. UserError for a state that was used before: a step may write into its
        buffers.
        """
        inner, steps = (None, 0) if state is None else state
        check_unused(inner, steps)
        hidden, inner = self.proposer(self.norm(residual), inner, keep)
        return self.readout(hidden), (inner, steps + residual.shape[1])

    def initial_state(self, batch: int) -> Tensor:
        """UserError: rollouts carry the state of a policy that reads switches alone."""
        raise UserError("this policy reads every step; act step by step with the model, and not in rollouts.")


class BodyProposer(nn.Module):
    """A causal body of the house, attention or Hawk, with its cache as the state, and a norm at the end."""

    def __init__(self, body: AttentionBody | HawkBody, dim: int) -> None:
        super().__init__()
        self.body, self.norm = body, nn.LayerNorm(dim)

    def forward(self, x: Tensor, state: Any = None, keep: bool = False) -> tuple[Tensor, Any]:
        """x (b, t, n), after the steps of ``state`` -> (b, t, n), the cache."""
        if state is None and keep:
            state = self.body.empty_cache(len(x))
        return self.norm(self.body(x, state)), state


class GruProposer(nn.Module):
    """A GRU as wide as its input."""

    def __init__(self, dim: int, *, depth: int = 1) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim, num_layers=depth, batch_first=True)

    def forward(self, x: Tensor, state: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor]:
        """x (b, t, n), state (depth, b, n) -> (b, t, n), next state."""
        return self.gru(x, state)


class MinGruProposer(nn.Module):
    """minGRU, a gated unit that is linear in its state (arXiv 2410.01201, section 3.1), computed by a scan.

    h_t = (1 - u_t) h_{t-1} + u_t c_t,  u_t = sigmoid(W_u x_t),  c_t = W_c x_t
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.update_and_candidate = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, state: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Tensor]:
        """x (b, t, n), state (b, n) -> (b, t, n), next state."""
        update, candidate = self.update_and_candidate(x).chunk(2, -1)
        hidden = linear_scan(torch.sigmoid(-update), torch.sigmoid(update) * candidate, state)
        return hidden, hidden[:, -1]


class MlpProposer(nn.Module):
    """Two layers over each step alone, without memory."""

    def __init__(self, dim: int, *, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, state: Any = None, keep: bool = False) -> tuple[Tensor, None]:
        """x (b, t, n) -> (b, t, n), no state."""
        return self.second(F.relu(self.first(x))), None


class ModuleProposer(nn.Module):
    """Any module as a proposer, under the names of its arguments.

    module(x, **{cache_key: state}) -> (b, t, n), or that and the next state; state_flag, if not None, is an argument
    that is set to true so that it returns the state.
    """

    def __init__(self, module: nn.Module, cache_key: str = "cache", state_flag: str | None = None) -> None:
        super().__init__()
        self.module, self.cache_key, self.state_flag = module, cache_key, state_flag

    def forward(self, x: Tensor, state: Any = None, keep: bool = False) -> tuple[Tensor, Any]:
        """x (b, t, n), after the steps of ``state`` -> (b, t, n), next state."""
        options: dict[str, Any] = {} if state is None else {self.cache_key: state}
        if self.state_flag is not None:
            options[self.state_flag] = True
        out = self.module(x, **options)
        return out if isinstance(out, tuple) else (out, None)


def make_proposer(dim: int, kind: ProposerKind = "attention", **options: Any) -> nn.Module:
    """A proposer over inputs of width ``dim``; options: of its class or body. UserError for another kind."""
    check_choice("kind of the proposer", kind, get_args(ProposerKind))
    if kind in ("attention", "hawk"):
        body = AttentionBody if kind == "attention" else HawkBody
        return BodyProposer(body(dim, **{"depth": 1, **options}), dim)
    return {"gru": GruProposer, "mingru": MinGruProposer, "mlp": MlpProposer}[kind](dim, **options)


def as_proposer(module: nn.Module) -> nn.Module:
    """A module as a proposer: one of these as it is, others as they take a cache, a GRU its state."""
    if isinstance(module, (BodyProposer, GruProposer, MinGruProposer, MlpProposer, ModuleProposer)):
        return module
    return ModuleProposer(module, "hx" if isinstance(module, nn.GRU) else "cache")
