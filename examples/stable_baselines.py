"""PPO or SAC of Stable-Baselines3 on the codes of a run: what acts is theirs, what steers is ours.

    pip install 'metacontroller-rl[expert]'
    python examples/stable_baselines.py RUN [--algorithm ppo] [--episodes 40000] [--output FILE.json]

RUN: a run folder after `metacontroller discover`. PPO acts on codes as they are: its Gaussian starts near the prior.
SAC acts on warped codes, so that its uniform first actions are samples of the prior. ``--copies`` trains on copies of
`InternalEnv` instead, for comparison; it needs the grid world. Prints success by episodes, which the run's own
``metacontroller internal-rl`` logs too, and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from metacontroller import InternalEnv, InternalVectorEnv
from metacontroller.environments.stable_baselines import StableBaselinesEnv
from metacontroller.recipes.config import load_run
from metacontroller.storage.run_folder import RunFolder

WINDOW = 1024
"""Episodes over which success is averaged."""


class Curve(BaseCallback):
    """Success of the last `WINDOW` episodes, each time as many have ended; stops after ``episodes``, or at ``goal``."""

    def __init__(self, episodes: int, goal: float) -> None:
        super().__init__()
        self.episodes, self.goal, self.start = episodes, goal, time.perf_counter()
        self.solved: list[bool] = []
        self.points: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
            if done:
                self.solved.append(bool(info["is_success"]))
                if len(self.solved) % WINDOW == 0:
                    success = sum(self.solved[-WINDOW:]) / WINDOW
                    seconds = time.perf_counter() - self.start
                    self.points.append({"episodes": len(self.solved), "success": success, "seconds": seconds})
                    print(f"{len(self.solved):>8,} episodes {seconds:>7.1f} s   success {success:.3f}", flush=True)
        return len(self.solved) < self.episodes and (not self.points or self.points[-1]["success"] < self.goal)


class Solved(gymnasium.Wrapper):
    """Says in `InternalEnv`'s info whether the episode was solved: on the grid, by its reward."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "is_success": float(reward) > 0}


def copies(run: Any, count: int) -> VecEnv:
    """Copies of `InternalEnv` on the grid world, stepped one after the other."""
    from metacontroller.domains.gridworld_pinpad import ENV_ID

    grid = {name: getattr(run.domain.config, name) for name in ("size", "num_colors", "num_walls", "max_steps")}

    def make() -> gymnasium.Env:
        inner = gymnasium.make(ENV_ID, **grid, task=run.domain.config.post_task, disable_env_checker=True)
        return Solved(InternalEnv(inner, run.model, run.meta_controller))

    return DummyVecEnv([make] * count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--algorithm", choices=("ppo", "sac"), default="ppo")
    parser.add_argument("--episodes", type=int, default=40_000)
    parser.add_argument("--goal", type=float, default=1.01, help="stop when this success is reached")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--decisions", type=int, default=2048, help="codes in one update of PPO, or before SAC learns")
    parser.add_argument("--copies", type=int, help="train on so many copies of InternalEnv instead, not warped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    run = load_run(RunFolder(arguments.run), "cpu")
    run.model.eval()
    run.meta_controller.eval()
    sac = arguments.algorithm == "sac"
    if arguments.copies:
        env = copies(run, arguments.copies)
    else:
        env = StableBaselinesEnv(
            InternalVectorEnv(run.domain, run.model, run.meta_controller, arguments.rows, warped=sac)
        )
    options: dict[str, Any] = {"gamma": 1.0, "seed": arguments.seed, "device": "cpu"}
    if sac:
        learner = SAC(
            "MlpPolicy",
            env,
            learning_starts=arguments.decisions,
            buffer_size=100_000,
            batch_size=512,
            gradient_steps=max(1, env.num_envs // 8),
            ent_coef=0.01,
            learning_rate=1e-3,
            **options,
        )
    else:
        learner = PPO(
            "MlpPolicy",
            env,
            n_steps=arguments.decisions // env.num_envs,
            batch_size=min(512, arguments.decisions),
            n_epochs=10,
            gae_lambda=1.0,
            learning_rate=2e-3,
            **options,
        )
    curve = Curve(arguments.episodes, arguments.goal)
    learner.learn(10**9, callback=curve)
    if arguments.output:
        content = {"arguments": vars(arguments), "points": curve.points}
        arguments.output.write_text(json.dumps(content, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
