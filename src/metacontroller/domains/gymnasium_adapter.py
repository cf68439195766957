"""Any Gymnasium environment as a `BatchedEnv`, by Gymnasium's own vector environments, without autoreset.

Axes: b rows that a rollout still plays, n environments that step together; n stays, b falls.
"""

from __future__ import annotations

import multiprocessing
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from metacontroller.data.spaces import encode_observations, environment_actions, model_dtype
from metacontroller.domains.guarded_environment import FLAGS, GuardedEnvironment, environment_facts, environment_id
from metacontroller.errors import UserError


class Block(gymnasium.Env):
    """Several environments that step together in one process, as one for Gymnasium's worker processes.

    Its observation is theirs side by side, with "reward" (m,) beside it.
    """

    def __init__(self, maker: GuardedEnvironment, count: int) -> None:
        self.envs = SyncVectorEnv([maker] * count, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self.action_space = self.envs.action_space
        reward = spaces.Box(-np.inf, np.inf, (count,), np.float64)
        self.observation_space = spaces.Dict({"reward": reward, **self.envs.observation_space})  # type: ignore[arg-type]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, _ = self.envs.reset(seed=seed, options=options)
        return {"reward": np.zeros(self.envs.num_envs), **observation}, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, *_ = self.envs.step(action)
        return {"reward": np.array(reward), **observation}, 0.0, False, False, {}

    def close(self) -> None:
        self.envs.close()


@dataclass(frozen=True)
class MakeBlock:
    """Makes a block in a worker process."""

    maker: GuardedEnvironment
    count: int

    def __call__(self) -> Block:
        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent too, which ends its workers
        return Block(self.maker, self.count)


class EnvironmentRows:
    """n guarded environments, in this process or shared out among worker processes.

    reset and step return "observation" (n, ...) as `data.spaces` encodes it, "reward" (n,) and the flags (n,).
    The number of processes does not change what an environment does: row i has the seed ``seed`` + i. One environment
    alone steps in this process. UserError if a process ends, which no exception of an environment does.
    """

    def __init__(self, maker: GuardedEnvironment, count: int, workers: int) -> None:
        facts = environment_facts(maker.name)
        self.observation_space, self.action_space = facts.observation_space, facts.action_space
        self.dtype = model_dtype(facts.observation_space)
        self.workers, self.count = min(workers, count) if count > 1 else 0, count
        if not self.workers:
            self.block = Block(maker, count)
            return
        self.share = -(-count // self.workers)  # the last worker may have a few more than are asked for
        blocks = [MakeBlock(maker, self.share)] * self.workers
        self.envs = AsyncVectorEnv(blocks, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        weakref.finalize(self, self.envs.close, terminate=True)

    def reset(self, seed: int, max_steps: int) -> dict[str, np.ndarray]:
        options = {"max_steps": max_steps}
        if not self.workers:
            return self._joined(self.block.reset(seed=seed, options=options)[0])
        seeds: list[int | None] = [seed + worker * self.share for worker in range(self.workers)]
        with self._alive():
            return self._joined(self.envs.reset(seed=seeds, options=options)[0])

    def step(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        """actions (n, ...): of the environment."""
        if not self.workers:
            return self._joined(self.block.step(actions)[0])
        missing = self.workers * self.share - len(actions)
        actions = np.concatenate([actions, np.repeat(actions[:1], missing, 0)])
        with self._alive():
            return self._joined(self.envs.step(actions.reshape(self.workers, self.share, *actions.shape[1:]))[0])

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """UserError where a pipe to a worker process breaks."""
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise UserError(
                "a process that steps environments has ended, killed or crashed by one of them; resume with --resume, "
                f"or set domain.workers below {self.workers} if memory ran out."
            ) from error

    def _joined(self, values: dict[str, Any]) -> dict[str, np.ndarray]:
        """The worker processes' rows one after the other."""
        if self.workers:
            values = _without_first_axis(values)
        encoded = {name: np.asarray(value)[: self.count] for name, value in values.items() if name != "observation"}
        observation = encode_observations(self.observation_space, values["observation"])[: self.count]
        return {"observation": observation.astype(self.dtype), **encoded}


def _without_first_axis(values: Any) -> Any:
    """Arrays (workers, share, ...) in a structure of Dict and Tuple -> (workers x share, ...)."""
    if isinstance(values, dict):
        return {name: _without_first_axis(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_without_first_axis(value) for value in values)
    return values.reshape(-1, *values.shape[2:])


class GymnasiumBatch:
    """b episodes of a Gymnasium environment that step together: its `BatchedEnv`.

    Actions of a Box are clipped to its bounds. lost (b,) bool: an exception of the environment ended the episode, which
    counts as truncated and not solved.
    """

    observation: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    lost: Tensor

    def __init__(self, rows: EnvironmentRows, seed: int, max_steps: int, device: torch.device) -> None:
        """seed: of row 0; row i has the next but i. max_steps: after which an episode is truncated."""
        self.envs, self.device = rows, device
        self.rows = np.arange(rows.count)
        self.taken: np.ndarray | None = None  # (n, ...), last actions of the environment
        self.steps = torch.zeros(rows.count, dtype=torch.int64, device=device)
        self.subgoals_done = torch.zeros_like(self.steps)
        self._show(rows.reset(seed, max_steps))

    def __len__(self) -> int:
        return len(self.rows)

    def step(self, actions: Tensor) -> Tensor:
        running = ~(self.terminated | self.truncated)
        chosen = environment_actions(self.envs.action_space, actions.cpu().numpy())
        if self.taken is None:
            self.taken = np.repeat(chosen[:1], self.envs.count, 0)
        self.taken[self.rows] = chosen
        values = self.envs.step(self.taken)
        self.steps = self.steps + running
        self._show(values)
        return torch.from_numpy(values["reward"][self.rows]).float().to(self.device)

    def select(self, rows: Tensor) -> None:
        self.rows = self.rows[rows.cpu().numpy()]
        for name in ("observation", "steps", "subgoals_done", *FLAGS):
            setattr(self, name, getattr(self, name)[rows])

    def goal(self) -> Tensor:
        return torch.full_like(self.steps, -1)

    def reached(self) -> Tensor:
        return torch.full_like(self.steps, -1)

    def _show(self, values: dict[str, np.ndarray]) -> None:
        self.observation = torch.from_numpy(values["observation"][self.rows]).to(self.device)
        for name in FLAGS:
            setattr(self, name, torch.from_numpy(values[name][self.rows] > 0).to(self.device))


class GymnasiumEnvironments:
    """Batches of episodes of one environment. Environments are made once for each size of batch and used again."""

    def __init__(self, name: str, *, success_return: float | None = None, workers: int = 0) -> None:
        """workers: processes in which the environments step; 0: this one. success_return: see `Guard`."""
        self.maker, self.workers = GuardedEnvironment(environment_id(name), success_return), workers
        self.free: dict[int, list[EnvironmentRows]] = {}

    def reset(self, n: int, generator: torch.Generator, max_steps: int) -> GymnasiumBatch:
        """n new episodes, whose seeds are drawn from the generator."""
        free = self.free.setdefault(n, [])
        rows = free.pop() if free else EnvironmentRows(self.maker, n, self.workers)
        seed = int(torch.randint(2**31 - n, (1,), generator=generator, device=generator.device))
        batch = GymnasiumBatch(rows, seed, max_steps, generator.device)
        weakref.finalize(batch, free.append, rows)  # nobody steps in them any more
        return batch
