"""All of this world that needs MuJoCo, but for pictures: many ants moved at once by MuJoCo's own threads.

A state (n, 29) float64 is qpos (15) then qvel (14). A step is a pure function of state and action: the constraint
solver starts from zero each time, so that a row's future depends neither on its past nor on its neighbors or threads.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from metacontroller.domains.ant_pinpad.observation import NUM_ACTIONS, STATE_SIZE
from metacontroller.errors import UserError, last_line

try:
    mujoco: Any = import_module("mujoco")
    rollout: Any = import_module("mujoco.rollout")
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "mujoco":
        raise
    raise UserError("mujoco is not installed; install it by: pip install 'metacontroller-rl[ant]'.") from missing
except Exception as error:  # it imports what MUJOCO_GL names, of which it raises whatever that does
    raise UserError(
        f"mujoco cannot be imported ({last_line(error)}); set MUJOCO_GL to what this machine can draw with, or to "
        "disabled."
    ) from error

__all__ = ["FRAME_SKIP", "MODEL", "Physics", "ant_model", "mujoco"]

FRAME_SKIP = 5
"""Steps of MuJoCo, 0.01 s each, in one step of the world (`simulator.STEP_SECONDS`), as in Gymnasium's ant."""
MODEL = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "ant.xml"
"""Gymnasium's model of the ant, the one that its Ant-v5 uses."""


@lru_cache(maxsize=1)
def ant_model() -> Any:
    """An MjModel: the ant on an endless floor; cells and walls are no bodies."""
    return mujoco.MjModel.from_xml_path(str(MODEL))


class Physics:
    """Moves ants on ``threads`` threads, 0: one a core."""

    def __init__(self, threads: int = 0) -> None:
        count = threads or os.cpu_count() or 1
        self.model = ant_model()
        self.data = [mujoco.MjData(self.model) for _ in range(count)]
        self.pool = rollout.Rollout(nthread=count if count > 1 else 0)

    def advance(self, state: np.ndarray, action: np.ndarray) -> np.ndarray:
        """state (n, 29), action (n, 8) -> the states after one step. Actions are clipped to -1..1.

        Rows whose simulation diverges are nan.
        """
        if not len(state):
            return state
        start = np.zeros((len(state), 1 + STATE_SIZE))  # time, then the state
        start[:, 1:] = state
        control = np.repeat(np.clip(action, -1.0, 1.0).reshape(-1, 1, NUM_ACTIONS), FRAME_SKIP, axis=1)
        reached, _ = self.pool.rollout(self.model, self.data, start, control.astype(np.float64))
        time, moved = reached[:, -1, :1], reached[:, -1, 1:]
        finished = time > (FRAME_SKIP - 0.5) * self.model.opt.timestep  # where it diverges, MuJoCo starts again from 0
        return np.where(finished, moved, np.nan)
