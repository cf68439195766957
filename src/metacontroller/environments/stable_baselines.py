"""`InternalVectorEnv` as a vector environment of Stable-Baselines3. Needs stable-baselines3 (the extra ``expert``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from metacontroller.arguments import checked_kinds
from metacontroller.environments.internal_vector_env import InternalVectorEnv
from metacontroller.errors import UserError

try:
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise UserError(
        "stable-baselines3 is not installed; pip install 'metacontroller-rl[expert]', or use InternalVectorEnv itself."
    ) from error


class StableBaselinesEnv(VecEnv):
    """``StableBaselinesEnv(InternalVectorEnv(...))``, for the algorithms of Stable-Baselines3.

    Where an episode ends, the observation returned is the first of the next one, as there. Info of each row: ``steps``,
    environment steps under the code. Of a row whose episode ended, also: ``terminal_observation``, the last
    observation; ``TimeLimit.truncated``, whether it was truncated, so that algorithms bootstrap; ``is_success``,
    ``episode_steps`` and ``subgoals_done``. `VecMonitor` around it adds returns; its lengths count codes.

    ``seed(n)`` seeds all rows at the next reset. The rows are no environments of their own: attributes are those of the
    `InternalVectorEnv`, and calls and assignments for some rows alone are UserErrors.
    """

    @checked_kinds
    def __init__(self, env: InternalVectorEnv) -> None:
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.actions = np.zeros(0)

    def reset(self) -> np.ndarray:
        """Starts an episode in every row."""
        observation, info = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self.reset_infos = [{"steps": steps} for steps in info["steps"].tolist()]
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions (b, n_z) for `step_wait`."""
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """One abstract action in every row."""
        observation, rewards, terminated, truncated, info = self.env.step(self.actions)
        infos: list[dict[str, Any]] = [
            {"steps": steps, "TimeLimit.truncated": cut}
            for steps, cut in zip(info["steps"].tolist(), truncated.tolist(), strict=True)
        ]
        ended = terminated | truncated
        for row in ended.nonzero()[0].tolist():
            final = {name: values[row].item() for name, values in info["final_info"].items() if name[0] != "_"}
            final["is_success"] = final.pop("success")
            infos[row] |= {"terminal_observation": info["final_obs"][row], **final}
            self.reset_infos[row] = {"steps": 0}
        return observation, rewards, ended, infos

    def close(self) -> None:
        """Closes the inner environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: int | Sequence[int] | None = None) -> list[Any]:  # pyright: ignore
        """The inner environment's attribute, once for each row."""
        value = getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Sequence[int] | None = None) -> None:  # pyright: ignore
        """Sets the inner environment's attribute; UserError for some rows alone."""
        self._check_all(indices)
        setattr(self.env, attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: int | Sequence[int] | None = None,  # pyright: ignore
        **method_kwargs: Any,
    ) -> list[Any]:
        """Calls the inner environment's method once; its result, once for each row. UserError for some rows alone."""
        self._check_all(indices)
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in range(self.num_envs)]

    def env_is_wrapped(self, wrapper_class: type, indices: int | Sequence[int] | None = None) -> list[bool]:  # pyright: ignore
        """Never: the rows have no wrappers."""
        return [False for _ in self._get_indices(indices)]

    def _check_all(self, indices: int | Sequence[int] | None) -> None:
        if indices is not None and sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise UserError(f"rows {indices} are no environments of their own; leave out indices.")
