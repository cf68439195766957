"""The action space of internal RL as an environment: Gaussian codes, as they are or warped.

Axes: n_z code.
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


@batch_space.register(CodeSpace)
def _(space: CodeSpace, n: int = 1) -> CodeSpace:
    return CodeSpace((n, *space.shape), warped=space.warped, seed=deepcopy(space.np_random))
