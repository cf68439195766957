"""How much sooner does PPO learn codes on `InternalVectorEnv` than on eight copies of `InternalEnv`?

Stable-Baselines3's PPO with the same settings on both, on a task of two subgoals of a run of the grid world; time until
success over the last `WINDOW` episodes reaches the goal. Both begin with the prior's codes. Seconds are given by the
wall clock and of this process; a seed that does not get there within the limit counts as not reached. Prints a table
and writes JSON.

    pip install 'metacontroller-rl[expert]'
    python benchmarks/ppo_vector_env.py RUN [--task 0-1] [--goal 0.8] [--seeds 0 1 2] [--output FILE.json]

RUN: a run folder after `metacontroller discover`; that of ``make reproduce`` unless given, and if that is not there, or
Stable-Baselines3 is not installed, nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium
import torch

from metacontroller import InternalEnv, InternalVectorEnv
from metacontroller.domains.gridworld_pinpad import ENV_ID
from metacontroller.recipes.config import load_run
from metacontroller.storage.run_folder import RunFolder

WINDOW = 512
"""Episodes over which success is averaged."""
COPIES = 8


class Solved(gymnasium.Wrapper):
    """Says in `InternalEnv`'s info whether the episode was solved: on the grid, by its reward."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "is_success": float(reward) > 0}


def vector_env(run: Any, task: Any, rows: int) -> Any:
    """One environment of many rows."""
    from metacontroller.environments.stable_baselines import StableBaselinesEnv

    return StableBaselinesEnv(InternalVectorEnv(run.domain, run.model, run.meta_controller, rows, task=task))


def copies(run: Any, task: Any) -> Any:
    """Copies of `InternalEnv`, stepped one after the other."""
    from stable_baselines3.common.vec_env import DummyVecEnv

    grid = {name: getattr(run.domain.config, name) for name in ("size", "num_colors", "num_walls", "max_steps")}

    def make() -> gymnasium.Env:
        inner = gymnasium.make(ENV_ID, **grid, task=task, disable_env_checker=True)
        return Solved(InternalEnv(inner, run.model, run.meta_controller))

    return DummyVecEnv([make] * COPIES)


def learn(env: Any, *, decisions: int, goal: float, limit: float, seed: int) -> dict[str, Any]:
    """Trains until the goal or the limit, seconds of the wall clock; how long that took and what was reached."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    solved: deque[bool] = deque(maxlen=WINDOW)
    found: dict[str, Any] = {"episodes": 0, "first_success": None, "reached": False}
    start = time.perf_counter(), time.process_time()

    class UntilGoal(BaseCallback):
        def _on_step(self) -> bool:
            for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
                if done:
                    solved.append(bool(info["is_success"]))
                    found["episodes"] += 1
            found["success"] = sum(solved) / max(1, len(solved))
            if len(solved) == WINDOW and found["first_success"] is None:
                found["first_success"] = found["success"]
            found["reached"] = len(solved) == WINDOW and found["success"] >= goal
            return not found["reached"] and time.perf_counter() - start[0] < limit

    learner = PPO(
        "MlpPolicy",
        env,
        n_steps=decisions // env.num_envs,
        batch_size=min(512, decisions),
        n_epochs=10,
        gamma=1.0,
        gae_lambda=1.0,
        learning_rate=2e-3,
        seed=seed,
        device="cpu",
    )
    learner.learn(10**9, callback=UntilGoal())
    wall, process = time.perf_counter() - start[0], time.process_time() - start[1]
    return {"seed": seed, "seconds": wall, "process_seconds": process, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/quick/seed-0"))
    parser.add_argument("--task", default="0-1")
    parser.add_argument("--goal", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=256, help="of InternalVectorEnv")
    parser.add_argument("--decisions", type=int, default=2048, help="codes in one update of PPO, in both")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for each training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out" / "ppo_vector_env.json")
    arguments = parser.parse_args()
    if importlib.util.find_spec("stable_baselines3") is None:
        print("not measured: stable-baselines3 is not installed (extra expert).")
        return
    if not (arguments.run / "meta_controller.safetensors").exists():
        print(f"not measured: {arguments.run} holds no metacontroller.")
        return
    torch.set_num_threads(arguments.threads)
    run = load_run(RunFolder(arguments.run), "cpu")
    run.model.eval()
    run.meta_controller.eval()
    task = run.domain.parse_task(arguments.task)
    kinds = {
        f"InternalVectorEnv, {arguments.rows} rows": lambda: vector_env(run, task, arguments.rows),
        f"InternalEnv x {COPIES}": lambda: copies(run, task),
    }
    options = {name: getattr(arguments, name) for name in ("decisions", "goal", "limit")}
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for seed in arguments.seeds:
        for kind, make in kinds.items():
            result = learn(make(), seed=seed, **options)
            found[kind].append(result)
            times = f"{result['seconds']:>7.1f} s ({result['process_seconds']:.1f} s of this process)"
            end = (
                f"reached {arguments.goal}" if result["reached"] else f"not reached: {result['success']:.3f} at the end"
            )
            print(f"{kind:<28} seed {seed}  {times}  {result['episodes']:>7,} episodes  {end}", flush=True)
    medians = {kind: statistics.median(result["seconds"] for result in results) for kind, results in found.items()}
    vector, single = medians.values()
    whole = all(result["reached"] for results in found.values() for result in results)
    doubt = "" if whole else "; no comparison, since some did not reach the goal"
    print(f"medians {vector:.1f} and {single:.1f} s, a ratio of {single / vector:.1f}{doubt}")
    report = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "run": str(arguments.run),
        "task": arguments.task,
        "rows": arguments.rows,
        **options,
        "medians": medians,
        "results": found,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
