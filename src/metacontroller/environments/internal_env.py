"""Internal RL as a Gymnasium environment whose actions are abstract actions (C.5, algorithm 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from metacontroller.arguments import checked_kinds
from metacontroller.control.core import SteeringState, initial_state
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.spaces import action_options, environment_actions, environment_states, readable
from metacontroller.domains.border import Misfit, began, fitted, observed, stepped
from metacontroller.domains.guarded_environment import tell_lost
from metacontroller.environments.code_space import CodeSpace, residual_array, spaces_of, steered_action
from metacontroller.errors import UserError
from metacontroller.models.protocol import SteerableModel
from metacontroller.models.readouts import CategoricalReadout, GaussianReadout


@dataclass
class _Episode:
    """A running episode between two abstract actions."""

    cache: Any
    state: SteeringState  # which has read the last observation
    residual: Tensor  # (1, n_e), of that observation


class InternalEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Internal RL as an environment, ``InternalEnv(env, model, meta_controller)``, in which any RL library can act.

    One step is one abstract action: the code steers the frozen model, whose sampled actions go to ``env``, until the
    gate opens (beta >= threshold) or the episode ends. So ``env`` must end its episodes, by a time limit if need be.

    Action space: ``Box(-5, 5, (n_z,), float32)``, the code z; if ``warped``, ``Box(-1, 1, (n_z,), float32)``, where the
    code is the inverse normal CDF of (action + 1) / 2 (`CodeSpace`). Codes beyond ±5 are clipped.
    ``action_space.sample()`` and ``sample_prior()`` explore the prior N(0, I) either way.

    Observation space: ``Box(-inf, inf, (n_e,), float32)``: the residual at the controlled layer for the observation at
    which the gate opened; after a reset, for the first one, which always takes a new code; at the end, for the last.

    Reward: the sum of ``env``'s rewards during the abstract action. Endings: ``terminated`` and ``truncated`` of
    ``env``; after either, call ``reset``.

    Info: ``steps``, environment steps of the abstract action; ``env_info``, the last info of ``env``; ``lost``, True,
    where a reward or an observation that is not finite or not of its space ended the episode as truncated: its last
    observation is the one before. What ``env`` raises is raised.

    Seeds: ``reset(seed=...)`` seeds ``env`` and the sampling of the model's actions. Versions: v0, as described here.

    Args:
        env: one environment, with the model's observations and actions; actions of a Gaussian readout are clipped to
            its action space.
        model: the frozen model. It, and the gate and controller of ``meta_controller``, are only read.
        meta_controller: its gate and controller act; its policy is not used.
        encode_observation: maps an observation of ``env`` to one state of the model, without batch and time axes; by
            default as a dataset of ``env`` would hold it (`data.spaces`), then the encoder's ``from_observation``.
        warped: see the action space.

    Raises:
        UserError: if the metacontroller or the action space of ``env`` does not fit the model, and in ``reset`` if the
            first observation is not of its space.
    """

    action_space: CodeSpace

    @checked_kinds
    def __init__(
        self,
        env: gymnasium.Env,
        model: SteerableModel,
        meta_controller: MetaController,
        *,
        encode_observation: Callable[[Any], Tensor] | None = None,
        warped: bool = False,
    ) -> None:
        self.observation_space, self.action_space = spaces_of(model, meta_controller, warped)
        _check_action_space(env.action_space, model)
        self.env, self.model, self.meta_controller = env, model, meta_controller
        self.encode_observation = encode_observation or self._encoded
        self._readable = None if encode_observation else readable(env.observation_space)
        self.metadata, self.render_mode = env.metadata, env.render_mode
        self._device = next(model.parameters()).device
        self._generator = torch.Generator(self._device)
        self._episode: _Episode | None = None

    @torch.no_grad()
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; ``options`` go to the inner environment."""
        super().reset(seed=seed)
        self._generator.manual_seed(int(self.np_random.integers(2**62)))
        cache, state = self.model.empty_cache(1), initial_state(self.meta_controller, 1)
        try:
            observation, info = began(self.env, seed=seed, options=options)
            residual = self._lower(cache, observation)
        except Misfit as error:
            raise UserError(f"env cannot be reset: {error}.") from error
        _, state = self.meta_controller.observe(residual, state)
        self._episode = _Episode(cache, state, residual)
        return residual_array(residual)[0], {"steps": 0, "env_info": info}

    @torch.no_grad()
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Steer with one code (n_z,) until the gate opens or the episode ends; UserError unless it is finite."""
        if self._episode is None:
            raise RuntimeError("no episode is running: call reset() first.")
        episode, code = self._episode, self.action_space.codes_of(action).to(self._device)[None]
        switch = torch.ones(1, dtype=torch.bool, device=self._device)
        total, steps, report = 0.0, 0, {"env_info": {}}
        while True:
            episode.state = self.meta_controller.integrate(episode.state, switch, code)
            taken = self._act(episode)
            try:
                observation, reward, terminated, truncated, info = stepped(self.env, self._env_action(taken))
                episode.residual = self._lower(episode.cache, observation, taken)
            except Misfit as error:
                tell_lost(str(self.env), error)
                terminated, truncated, report = False, True, {**report, "lost": True}
                break
            total, steps, report = total + reward, steps + 1, {"env_info": info}
            beta, episode.state = self.meta_controller.observe(episode.residual, episode.state)
            switch = beta >= self.meta_controller.gate_config.threshold
            if terminated or truncated or bool(switch):
                break
        if terminated or truncated:
            self._episode = None
        return residual_array(episode.residual)[0], total, terminated, truncated, {"steps": steps, **report}

    def sample_prior(self) -> np.ndarray:
        """An action (n_z,) whose code is a sample of the prior N(0, I), from ``np_random``; seeded by ``reset``."""
        return self.action_space.prior(self.np_random)

    def render(self) -> Any:
        """The inner environment's picture."""
        return self.env.render()

    def close(self) -> None:
        """Close the inner environment."""
        self.env.close()

    def _encoded(self, observation: Any) -> Tensor:
        """One observation as a state, without batch and time axes; Misfit if it is none of its space."""
        assert self._readable is not None
        seen = observed(self.env.observation_space, self._readable, observation)
        return self.model.encoder.from_observation(environment_states(self._readable, [seen])[0])

    def _lower(self, cache: Any, observation: Any, past_action: Tensor | None = None) -> Tensor:
        """(1, n_e) residual at the controlled layer for a new observation; Misfit unless it is finite."""
        state = self.encode_observation(observation).to(self._device)
        if not bool(state.isfinite().all()):
            raise Misfit("the observation as the model reads it is not finite")
        return self.model.lower(self.model.embed(state[None, None], past_action), cache.lower)[:, 0]

    def _act(self, episode: _Episode) -> Tensor:
        """(1, 1, ...) sampled action of the steered model, within the inner environment's bounds."""
        parts = episode.residual, episode.state, episode.cache.upper, self._generator
        action = steered_action(self.model, self.meta_controller, *parts)
        if isinstance(self.env.action_space, spaces.Box):
            bounds = (self.env.action_space.low, self.env.action_space.high)
            action = action.clamp(*(torch.as_tensor(bound).to(action).flatten() for bound in bounds))
        return action

    def _env_action(self, action: Tensor) -> Any:
        """The sampled action as the inner environment takes it; Misfit unless it is finite."""
        taken = environment_actions(self.env.action_space, action[0].cpu().numpy())[0]
        return fitted(self.env.action_space, taken, "the action")


def _check_action_space(space: spaces.Space, model: SteerableModel) -> None:
    readout = model.action_readout
    if isinstance(readout, GaussianReadout):
        options, expected = {"num_continuous": readout.num_continuous}, f"a Box of {readout.num_continuous} numbers"
    elif isinstance(readout, CategoricalReadout):
        options, expected = {"num_discrete": readout.num_discrete}, f"Discrete({readout.num_discrete})"
    else:
        options, expected = {"num_discrete": list(readout.sizes)}, f"choices of {list(readout.sizes)}"
    if action_options(space) != options:
        raise UserError(f"env has action space {space}; expected {expected}, as the model's actions.")
