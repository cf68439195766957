"""Internal RL as a Gymnasium vector environment: many episodes, with one step of the frozen model for all (C.5).

Axes: b rows, m rows that still hold their code, n_e residual, n_z code.

How rows of different speed share a batch. A step holds the code of each row until its gate opens, which takes some rows
one step of the environment and others twenty. Every row is at a time of its own. So a step of this environment takes
all rows out of a store as one batch, and whichever row is done is put back and leaves the batch at once. The model
never steps a row that waits. What is left of waiting are the last steps of the slowest row, taken with few others.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from metacontroller.arguments import checked_kinds
from metacontroller.control.core import SteeringState, initial_state
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.base import BatchedEnv, Domain
from metacontroller.domains.reset_mask import rows_to_reset
from metacontroller.environments.code_space import CodeSpace, residual_array, spaces_of, steered_action
from metacontroller.environments.single_rows import SingleRows
from metacontroller.errors import UserError
from metacontroller.models.precision import weights_cast_once
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.rollout import survivors
from metacontroller.ranges import Rows, check

ATTEMPTS = 10
"""So often a row begins an episode anew where its world cannot start one."""


class _ReplaceableEnv(BatchedEnv, Protocol):
    def replace(self, rows: Tensor, other: Any) -> None: ...


@dataclass
class _Rows:
    """Episodes between two abstract actions: residual (b, n_e) of the last observation, which the state has read."""

    env: _ReplaceableEnv
    caches: Any
    state: SteeringState
    residual: Tensor

    def put(self, rows: Tensor, state: SteeringState, residual: Tensor) -> None:
        """Writes what else there is of ``rows`` (m,) besides environment and caches."""
        for name in ("history", "z", "steps_since_switch"):  # no policy acts here
            getattr(self.state, name)[rows] = getattr(state, name)
        self.residual[rows] = residual


class _Batch:
    """Rows that hold their codes and step together: a copy of all at first, from which those that are done leave.

    rows (m,): which they are. taken: steps since they were taken out. The rest is as in `_Rows`.
    """

    def __init__(self, home: _Rows) -> None:
        self.rows = torch.arange(len(home.residual), device=home.residual.device)
        self.env = _taken(home.env, self.rows)
        self.lower, self.upper = home.caches.lower.take(self.rows), home.caches.upper.take(self.rows)
        self.state, self.residual = home.state, home.residual
        self.taken = 0

    def put_back(self, home: _Rows, done: Tensor) -> None:
        """Stores the rows where done (m,) bool is true, and drops them here."""
        at, remaining = done.nonzero().squeeze(1), survivors(~done, exact=True)
        rows = self.rows[at]
        home.caches.lower.put(rows, self.lower, at, self.taken)
        home.caches.upper.put(rows, self.upper, at, self.taken)
        home.env.replace(rows, _taken(self.env, at))
        home.put(rows, self.state.index(at), self.residual[at])
        for part in (self.env.select, self.lower.keep, self.upper.keep):
            part(remaining)
        self.rows, self.residual = self.rows[remaining], self.residual[remaining]
        self.state = self.state.index(remaining)


class InternalVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`InternalEnv` many times over: ``InternalVectorEnv(domain, model, meta_controller, 256)``.

    One step is one abstract action in every row: each code steers the frozen model in its row until the gate opens
    (beta >= threshold) or the episode ends. All rows share each step of the model. Spaces, rewards, endings and the
    clipping of codes are those of `InternalEnv`, with a leading axis of ``num_envs``. The inner episodes are those of
    ``domain.reset``, so they see what `evaluate` and `internal_rl` see.

    Autoreset is ``SAME_STEP``: where an episode ends, the observation returned is the first of the next one. The last
    one is ``info["final_obs"]``, an object array with None elsewhere, and its info ``info["final_info"]``.

    Info, with Gymnasium's masks ``_steps`` and so on: ``steps`` int64 (b,), environment steps taken by the abstract
    action, 0 where a new episode begins. In ``final_info``, of the rows whose episode ended: ``steps``; ``success``, as
    the world says; ``episode_steps`` and ``subgoals_done`` of the whole episode; ``lost``, whether an exception of the
    world ended it, where that can happen.

    Seeds: ``reset(seed=...)`` settles episodes and sampled actions of all rows; ``seed`` is one number. Options of
    ``reset``: Gymnasium's ``reset_mask``.

    An episode that cannot start, because its world raises, is no step: the row begins another, ten times at most.

    It can be pickled at any time, unless its world steps in worker processes, and the copy goes on in the same way. A
    world whose batches have no ``replace(rows, other)`` is played row by row: the model still takes one step for all.

    Args:
        domain: the world.
        model: the frozen model. It, and the gate and controller of ``meta_controller``, are only read.
        meta_controller: its gate and controller act; its policy is not used.
        num_envs: b.
        task: as of ``domain.reset``; None is the post-training task.
        warped: as of `InternalEnv`.

    Raises:
        UserError: if the metacontroller does not fit the model, or the model has no ``cache_store``.
    """

    action_space: CodeSpace

    @checked_kinds
    def __init__(
        self,
        domain: Domain,
        model: SteerableModel,
        meta_controller: MetaController,
        num_envs: int = 1,
        *,
        task: Any = None,
        warped: bool = False,
    ) -> None:
        check("num_envs", num_envs, Rows)
        model.cache_store(1)  # raises if the model has none
        self.domain, self.model, self.meta_controller = domain, model, meta_controller
        self.task, self.warped, self.num_envs = task, warped, num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.single_observation_space, self.single_action_space = spaces_of(model, meta_controller, warped)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = CodeSpace((num_envs, meta_controller.dim_latent), warped=warped)
        self._device = next(model.parameters()).device
        self._generator = torch.Generator(self._device)
        self._rows: _Rows | None = None
        self._by_row = False  # whether the world's batches were found to have no `replace`

    @torch.no_grad()
    @weights_cast_once()
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every row, or in those of ``options["reset_mask"]`` (b,) bool; the info is theirs.

        A seed settles what comes from then on in all rows."""
        chosen = rows_to_reset(options, self.num_envs, self._rows is not None)
        super().reset(seed=seed)
        if seed is not None or chosen is None:
            self._generator.manual_seed(int(self.np_random.integers(2**62)))
        if chosen is None or self._rows is None:
            self._rows = None  # what the last episodes were played with can be used again
            self._rows = self._begin()
        else:
            self._renew(self._rows, torch.from_numpy(chosen.nonzero()[0]).to(self._device))
        begun = np.ones(self.num_envs, bool) if chosen is None else chosen
        info = _masked({"steps": np.zeros(self.num_envs, np.int64)}, begun)
        return residual_array(self._rows.residual), info

    @torch.no_grad()
    @weights_cast_once()
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steers each row with its action (b, n_z) until its gate opens or its episode ends; see `codes`."""
        if self._rows is None:
            raise RuntimeError("no episode has started: call reset() first.")
        home, rewards = self._rows, torch.zeros(self.num_envs, device=self._device)
        steps = self._hold(home, self.codes(actions), rewards)
        terminated, truncated = (ended.cpu().numpy().copy() for ended in (home.env.terminated, home.env.truncated))
        info = self._begin_again(home, _ended(home.env), steps)
        return residual_array(home.residual), rewards.cpu().numpy(), terminated, truncated, info

    def codes(self, actions: np.ndarray) -> Tensor:
        """The codes (b, n_z) that actions (b, n_z) stand for; UserError unless they are finite."""
        return self.action_space.codes_of(actions).to(self._device)

    def sample_prior(self) -> np.ndarray:
        """Actions (b, n_z) whose codes are samples of the prior N(0, I), from ``np_random``; seeded by ``reset``."""
        return self.action_space.prior(self.np_random)

    def _hold(self, home: _Rows, codes: Tensor, rewards: Tensor) -> np.ndarray:
        """Holds codes (b, n_z) until every row is done; adds to rewards (b,), returns the steps taken (b,)."""
        steering, batch, steps = self.meta_controller, _Batch(home), np.zeros(self.num_envs, np.int64)
        everywhere = torch.ones_like(batch.rows, dtype=torch.bool)
        batch.state = steering.integrate(batch.state, everywhere, codes)
        while True:
            action = steered_action(self.model, steering, batch.residual, batch.state, batch.upper, self._generator)
            rewards[batch.rows] += batch.env.step(action[:, 0])
            states = batch.env.observation[:, None]
            batch.residual = self.model.lower(self.model.embed(states, action), batch.lower)[:, 0]
            batch.taken += 1
            beta, batch.state = steering.observe(batch.residual, batch.state)
            done = (beta >= steering.gate_config.threshold) | _ended(batch.env)
            if bool(done.any()):
                steps[batch.rows[done].cpu().numpy()] = batch.taken
                batch.put_back(home, done)
            if not len(batch.rows):
                return steps
            nowhere = torch.zeros_like(batch.rows, dtype=torch.bool)
            batch.state = steering.integrate(batch.state, nowhere, batch.state.z)

    def _begin(self) -> _Rows:
        """New episodes in every row, after their first observations."""
        env, caches = self._episodes(self.num_envs), self.model.cache_store(self.num_envs)
        rows = _Rows(env, caches, *self._look(env, caches, torch.arange(self.num_envs, device=self._device)))
        unstarted = _ended(env).nonzero().squeeze(1)
        if len(unstarted):
            self._renew(rows, unstarted)
        return rows

    def _begin_again(self, home: _Rows, ended: Tensor, steps: np.ndarray) -> dict[str, Any]:
        """Replaces the episodes that ended (b,) bool by new ones; the info of this step, which took ``steps`` (b,)."""
        over = ended.cpu().numpy()
        info = _masked({"steps": np.where(over, 0, steps)}, np.ones_like(over))
        if not over.any():
            return info
        env, final = home.env, {"steps": steps}
        measured = {"success": env.success, "episode_steps": env.steps, "subgoals_done": env.subgoals_done}
        for name, value in {**measured, "lost": getattr(env, "lost", None)}.items():
            if value is not None:
                final[name] = value.cpu().numpy().copy()
        last = np.full(self.num_envs, None, dtype=object)
        for row, residual in zip(over.nonzero()[0], residual_array(home.residual[ended]), strict=True):
            last[row] = residual
        self._renew(home, ended.nonzero().squeeze(1))
        return info | _masked({"final_obs": last, "final_info": _masked(final, over)}, over)

    def _renew(self, home: _Rows, rows: Tensor) -> None:
        """Begins new episodes in ``rows`` (m,) int64, again where one could not start."""
        starting = rows
        for _ in range(ATTEMPTS):
            begin_again = getattr(home.env, "begin_again", None)
            if begin_again is None:
                home.env.replace(starting, self._episodes(len(starting)))
            else:
                begin_again(starting, self._generator)
            starting = starting[_ended(home.env)[starting]]
            if not len(starting):
                break
        else:
            failed = f"the world {self.domain.name} could not begin an episode, {ATTEMPTS} times in a row"
            raise UserError(f"{failed}; make its reset succeed.")
        home.caches.restart(rows)
        home.put(rows, *self._look(home.env, home.caches, rows))

    def _look(self, env: _ReplaceableEnv, caches: Any, rows: Tensor) -> tuple[SteeringState, Tensor]:
        """Reads the first observation of the episodes ``rows`` (m,): state and residual of `_Rows`."""
        state, lower = initial_state(self.meta_controller, len(rows)), caches.lower.take(rows)
        residual = self.model.lower(self.model.embed(env.observation[rows][:, None]), lower)[:, 0]
        caches.lower.put(rows, lower, torch.arange(len(rows), device=rows.device), 1)
        _, state = self.meta_controller.observe(residual, state)
        return state, residual

    def _episodes(self, n: int) -> _ReplaceableEnv:
        if not self._by_row:
            env = self.domain.reset(n, self._generator, task=self.task)
            if hasattr(env, "replace"):
                return env  # pyright: ignore[reportReturnType]
            self._by_row = True
        return SingleRows([self.domain.reset(1, self._generator, task=self.task) for _ in range(n)])


def _ended(env: BatchedEnv) -> Tensor:
    """(b,) bool: episodes that are over; one that has just begun could not start."""
    return env.terminated | env.truncated


def _taken(env: _ReplaceableEnv, rows: Tensor) -> _ReplaceableEnv:
    """The episodes ``rows`` (m,) of a batch, which stays as it is."""
    taken = copy(env)
    taken.select(rows)
    return taken


def _masked(values: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """An info whose values exist for some rows (b,) bool, with Gymnasium's masks."""
    return {name: value for key, item in values.items() for name, value in ((key, item), (f"_{key}", rows.copy()))}
