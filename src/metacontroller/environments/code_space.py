"""What both environments of internal RL share: the spaces of codes and residuals, and the action under a code.

Axes: m rows, n_e residual, n_z code.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor

from metacontroller.control.core import SteeringState
from metacontroller.control.metacontroller import MetaController
from metacontroller.errors import UserError
from metacontroller.models.protocol import SteerableModel
from metacontroller.ranges import shown

CODE_LIMIT = 5.0
"""Codes beyond are clipped: hardly any of the prior N(0, I) lies outside."""


class CodeSpace(spaces.Box):
    """Actions (..., n_z) that stand for codes: a Box of -5..5, whose actions are the codes, or if ``warped`` of -1..1.

    A warped action a stands for the inverse normal CDF of (a + 1) / 2. ``sample`` gives actions whose codes are samples
    of the prior N(0, I) either way; warped ones are uniform, for libraries that explore the Box on their own.
    """

    def __init__(self, shape: tuple[int, ...], *, warped: bool = False, seed: Any = None) -> None:
        limit = 1.0 if warped else CODE_LIMIT
        super().__init__(-limit, limit, shape, np.float32, seed)
        self.warped = warped

    def sample(self, mask: None = None, probability: None = None) -> np.ndarray:
        """One action, from the space's own random numbers."""
        return self.prior(self.np_random)

    def prior(self, rng: np.random.Generator) -> np.ndarray:
        """An action from given random numbers."""
        if self.warped:
            return rng.uniform(-1, 1, self.shape).astype(np.float32)
        return rng.standard_normal(self.shape, np.float32).clip(-CODE_LIMIT, CODE_LIMIT)

    def codes(self, actions: Tensor) -> Tensor:
        """The codes that actions stand for, (..., n_z) each."""
        codes = math.sqrt(2) * torch.erfinv(actions.clamp(-1, 1)) if self.warped else actions
        return codes.clamp(-CODE_LIMIT, CODE_LIMIT)

    def codes_of(self, action: Any) -> Tensor:
        """The codes of an action of this space; UserError unless it is finite and of its shape."""
        given = torch.as_tensor(np.asarray(action), dtype=torch.float32)
        if given.shape != self.shape or not bool(given.isfinite().all()):
            raise UserError(f"actions are {shown(given.tolist())}; expected finite numbers of shape {self.shape}.")
        return self.codes(given)


@batch_space.register(CodeSpace)
def _(space: CodeSpace, n: int = 1) -> CodeSpace:
    return CodeSpace((n, *space.shape), warped=space.warped, seed=deepcopy(space.np_random))


def spaces_of(model: SteerableModel, meta_controller: MetaController, warped: bool) -> tuple[spaces.Box, CodeSpace]:
    """Residuals (n_e,) and codes (n_z,); UserError unless the metacontroller fits the model and has Gaussian codes,
    vectors of numbers without a discrete structure."""
    dim, kind = meta_controller.dim_model, meta_controller.codes.kind
    if model.dim != dim:
        raise UserError(f"meta_controller has dim_model {dim}; expected {model.dim}, the model's dim.")
    if kind != "gaussian":
        raise UserError(
            f"meta_controller has {kind} codes; expected Gaussian ones; train over others with the command internal-rl."
        )
    residuals = spaces.Box(-np.inf, np.inf, (model.dim,), np.float32)
    return residuals, CodeSpace((meta_controller.dim_latent,), warped=warped)


def steered_action(
    model: SteerableModel,
    meta_controller: MetaController,
    residual: Tensor,
    state: SteeringState,
    cache: Any,
    generator: torch.Generator,
) -> Tensor:
    """(m, 1, ...): an action of the upper body, with its cache, under the codes of a state; residual (m, n_e)."""
    steered = meta_controller.steer(residual, state.z)
    params = model.action_readout(model.upper(steered[:, None], cache))
    return model.action_readout.sample(params, generator, temperature=meta_controller.action_temperature)


def residual_array(residual: Tensor) -> np.ndarray:
    """Residuals as an observation, a copy in float32."""
    return residual.to(torch.float32).cpu().numpy().copy()
