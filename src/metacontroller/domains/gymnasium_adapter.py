"""Any Gymnasium environment as a `BatchedEnv`, by Gymnasium's own vector environments, without autoreset.

Axes: b rows that a rollout still plays, n environments that step together; n stays, b falls.
"""

from __future__ import annotations

import multiprocessing
import signal
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from metacontroller.data.spaces import environment_actions, environment_states, model_dtype, model_shape
from metacontroller.domains.guarded_environment import FLAGS, Guard, GuardedEnvironment, environment_id
from metacontroller.errors import UserError

ROW_TENSORS = ("observation", "steps", "subgoals_done", *FLAGS)
"""The tensors of a `GymnasiumBatch`, with one row an episode."""


class Block(gymnasium.Env):
    """m guarded environments that step together in one process, as one for Gymnasium's worker processes.

    Its observation is a Dict: "observation" (m, ...), theirs as a model reads them, "reward" (m,), and the flags (m,).
    An action is theirs, and which of them play it (m,); the others hold still. ``options`` of ``reset``: "max_steps",
    and "seeds" int64 (blocks, m), of which it reads the row ``number``: episodes with a seed of -1 go on.
    """

    def __init__(self, maker: GuardedEnvironment, count: int, number: int = 0) -> None:
        self.envs, self.number = [Guard(maker) for _ in range(count)], number
        self.space = maker.facts.observation_space
        self.action_space = spaces.Tuple((batch_space(maker.facts.action_space, count), spaces.MultiBinary(count)))
        parts: dict[str, spaces.Space] = dict.fromkeys(FLAGS, spaces.MultiBinary(count))
        parts["reward"] = spaces.Box(-np.inf, np.inf, (count,), np.float64)
        parts["observation"] = spaces.Box(0, 1, (count, *model_shape(self.space)), model_dtype(self.space))  # type: ignore
        self.observation_space = spaces.Dict(parts)  # Gymnasium looks at shapes and types, not at bounds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert options is not None
        for env, env_seed in zip(self.envs, options["seeds"][self.number].tolist(), strict=True):
            if env_seed >= 0:
                env.reset(env_seed, options["max_steps"])
        return self._observed([0.0] * len(self.envs)), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        rewards = [env.step(own) if plays else 0.0 for env, own, plays in zip(self.envs, *action, strict=True)]
        return self._observed(rewards), 0.0, False, False, {}

    def _observed(self, rewards: list[float]) -> dict[str, np.ndarray]:
        seen = environment_states(self.space, [env.read for env in self.envs])
        flags = {name: np.array([env.flags[name] for env in self.envs]) for name in FLAGS}
        return {"observation": seen, "reward": np.array(rewards), **flags}

    def close(self) -> None:
        for env in self.envs:
            env.close()


def make_worker_block(maker: GuardedEnvironment, count: int, number: int) -> Block:
    """A block in a worker process."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent too, which ends its workers
    return Block(maker, count, number)


class EnvironmentRows:
    """n guarded environments, in this process or shared out among worker processes.

    reset and step return what a `Block` observes, of all n.
    The number of processes does not change what an environment does. One environment alone steps in this process.
    UserError if a process ends, which no exception of an environment does. They can be pickled in this process only.
    """

    def __init__(self, maker: GuardedEnvironment, count: int, workers: int) -> None:
        self.action_space = maker.facts.action_space
        self.workers, self.count = min(workers, count) if count > 1 else 0, count
        self.share = -(-count // max(self.workers, 1))  # the last worker may have a few more than are asked for
        if not self.workers:
            self.envs: Any = Block(maker, count)
            weakref.finalize(self, self.envs.close)
            return
        blocks = [partial(make_worker_block, maker, self.share, number) for number in range(self.workers)]
        self.envs = AsyncVectorEnv(blocks, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        weakref.finalize(self, self.envs.close, terminate=True)

    def reset(self, seed: int, max_steps: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Begins new episodes in ``rows`` (m,), by default in all; the first of them has that seed, the next the next
        number. The episodes of other rows go on."""
        seeds = np.full(max(self.workers, 1) * self.share, -1)
        seeds[slice(None) if rows is None else rows] = seed + np.arange(len(seeds) if rows is None else len(rows))
        options = {"max_steps": max_steps, "seeds": seeds.reshape(-1, self.share)}
        return self._joined(lambda: self.envs.reset(options=options))

    def step(self, rows: np.ndarray, actions: np.ndarray) -> dict[str, np.ndarray]:
        """rows (b,): those that play; the others hold still. actions (b, ...): theirs, of the environment."""
        total = max(self.workers, 1) * self.share
        taken, playing = np.repeat(actions[:1], total, 0), np.zeros(total, np.int8)
        taken[rows], playing[rows] = actions, 1
        if self.workers:
            taken, playing = (array.reshape(self.workers, self.share, *array.shape[1:]) for array in (taken, playing))
        return self._joined(lambda: self.envs.step((taken, playing)))

    def __getstate__(self) -> dict[str, Any]:
        if self.workers:
            raise UserError(
                "environments that step in worker processes cannot be pickled or copied; set domain.workers to 0."
            )
        return vars(self)

    def _joined(self, call: Callable[[], Any]) -> dict[str, np.ndarray]:
        """What a call of the environments returns, the worker processes' rows one after the other."""
        try:
            values = call()[0]
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise UserError(
                "a process that steps environments has ended, killed or crashed by one of them; resume with --resume, "
                f"or set domain.workers below {self.workers} if memory ran out."
            ) from error
        if self.workers:
            values = {name: value.reshape(-1, *value.shape[2:]) for name, value in values.items()}
        return {name: value[: self.count] for name, value in values.items()}


class GymnasiumBatch:
    """b episodes of a Gymnasium environment that step together: its `BatchedEnv`.

    Actions of a Box are clipped to its bounds. lost (b,) bool: an exception of the environment, or a value of it that
    is not finite or not of its space, ended the episode, which counts as truncated and not solved. An episode stays
    with its environment: ``begin_again`` begins new ones, and ``replace`` takes back rows that stepped in a shallow
    copy of the batch, and no others.
    """

    observation: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    lost: Tensor

    def __init__(self, rows: EnvironmentRows, seed: int, max_steps: int, device: torch.device) -> None:
        """seed: of row 0; row i has the next but i. max_steps: after which an episode is truncated."""
        self.envs, self.device, self.max_steps = rows, device, max_steps
        self.rows = np.arange(rows.count)
        self.steps = torch.zeros(rows.count, dtype=torch.int64, device=device)
        self.subgoals_done = torch.zeros_like(self.steps)
        vars(self).update(self._seen(rows.reset(seed, max_steps), self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def step(self, actions: Tensor) -> Tensor:
        running = ~(self.terminated | self.truncated)
        chosen = environment_actions(self.envs.action_space, actions.cpu().numpy())
        values = self.envs.step(self.rows, chosen)
        self.steps = self.steps + running
        vars(self).update(self._seen(values, self.rows))
        return torch.from_numpy(values["reward"][self.rows]).float().to(self.device)

    def select(self, rows: Tensor) -> None:
        self.rows = self.rows[rows.cpu().numpy()]
        for name in ROW_TENSORS:
            setattr(self, name, getattr(self, name)[rows])

    def begin_again(self, rows: Tensor, generator: torch.Generator) -> None:
        """New episodes in ``rows``, int64 (m,), whose seeds are drawn from the generator."""
        chosen = self.rows[rows.cpu().numpy()]
        values = self.envs.reset(_draw_seed(len(chosen), generator), self.max_steps, chosen)
        for name, value in self._seen(values, chosen).items():
            setattr(self, name, getattr(self, name).index_copy(0, rows, value))
        self.steps = self.steps.index_fill(0, rows, 0)

    def replace(self, rows: Tensor, other: GymnasiumBatch) -> None:
        """Takes over where ``other``, a copy of this batch, brought the episodes ``rows``, int64 (m,), meanwhile.

        UserError for other episodes.
        """
        if other.envs is not self.envs or not np.array_equal(self.rows[rows.cpu().numpy()], other.rows):
            raise UserError("an episode of a Gymnasium environment cannot go to another row; use begin_again().")
        for name in ROW_TENSORS:
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(other, name)))

    def goal(self) -> Tensor:
        return torch.full_like(self.steps, -1)

    def reached(self) -> Tensor:
        return torch.full_like(self.steps, -1)

    def _seen(self, values: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, Tensor]:
        """Observations and flags of the environments ``rows``."""
        arrays = {"observation": values["observation"][rows], **{name: values[name][rows] > 0 for name in FLAGS}}
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}


def _draw_seed(n: int, generator: torch.Generator) -> int:
    """The seed of the first of n episodes; the others have the next numbers."""
    return int(torch.randint(2**31 - n, (1,), generator=generator, device=generator.device))


class GymnasiumEnvironments:
    """Batches of episodes of one environment. Environments are made once for each size of batch and used again."""

    def __init__(
        self, name: str, *, kwargs: str | None = None, success_return: float | None = None, workers: int = 0
    ) -> None:
        """workers: processes in which the environments step; 0: this one. kwargs, success_return: as of
        `GuardedEnvironment`."""
        self.maker, self.workers = GuardedEnvironment(environment_id(name), success_return, kwargs), workers
        self.free: dict[int, list[EnvironmentRows]] = {}

    def reset(self, n: int, generator: torch.Generator, max_steps: int) -> GymnasiumBatch:
        """n new episodes, whose seeds are drawn from the generator."""
        free = self.free.setdefault(n, [])
        rows = free.pop() if free else EnvironmentRows(self.maker, n, self.workers)
        batch = GymnasiumBatch(rows, _draw_seed(n, generator), max_steps, generator.device)
        weakref.finalize(batch, free.append, rows)  # nobody steps in them any more
        return batch
