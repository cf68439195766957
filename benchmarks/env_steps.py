"""How many grid steps a second does one core make? gridworld-pinpad in batches, beside a MiniGrid grid stepped singly.

Random actions. Grids that have ended stay in the batch until it is started afresh; their idle steps are not counted.
Prints a table and writes JSON.

    python benchmarks/env_steps.py [--seconds 0.5] [--output benchmarks/out/env_steps.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from metacontroller.domains.gridworld_pinpad.expert import expert_trajectories
from metacontroller.domains.gridworld_pinpad.gymnasium_env import GridworldPinpadVectorEnv
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.domains.pinpad.layouts import sample_layouts
from metacontroller.domains.pinpad.tasks import TABLE_A1, pad_tasks

BATCH_SIZES = (64, 256, 1024, 4096, 16384)
STEPS_PER_START = 8


def rate(work: Callable[[], int], seconds: float) -> float:
    """Units of work per second: `work` does some and says how much; it is called once unmeasured, then repeatedly."""
    work()
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        done += work()
    return done / elapsed


def pinpad_rate(config: PinpadConfig, batch_size: int, seconds: float) -> float:
    """Steps per second of the simulator alone: the time it takes to start the grids is left out."""
    generator = torch.Generator().manual_seed(0)
    layouts = sample_layouts(config, batch_size, generator)
    tasks, lengths = pad_tasks(TABLE_A1)
    drawn = torch.randint(len(TABLE_A1), (batch_size,), generator=generator)
    actions = torch.randint(4, (STEPS_PER_START, batch_size), generator=generator)
    stepping = 0.0
    steps = 0
    while stepping < seconds:
        batch = PinpadBatch(config, layouts, tasks[drawn], lengths[drawn])
        start = time.perf_counter()
        for action in actions:
            batch.step(action)
        stepping += time.perf_counter() - start
        steps += int(batch.steps.sum())
    return steps / stepping


def vector_env_rate(batch_size: int, seconds: float) -> float:
    """Steps per second through the Gymnasium interface: one-hot observations, infos and resets are counted."""
    envs = GridworldPinpadVectorEnv(batch_size)
    envs.reset(seed=0)
    random = np.random.default_rng(0)

    def work() -> int:
        envs.step(random.integers(4, size=batch_size))
        return batch_size

    return rate(work, seconds)


def expert_rate(config: PinpadConfig, batch_size: int, seconds: float) -> float:
    """Steps per second of expert episodes made from scratch: layouts, shortest paths and play."""
    generator = torch.Generator().manual_seed(0)

    def work() -> int:
        return int(expert_trajectories(config, TABLE_A1, batch_size, generator=generator).lengths.sum())

    return rate(work, seconds)


def minigrid_rate(env: gymnasium.Env[Any, Any], seconds: float) -> float:
    """Steps per second of one MiniGrid environment, turning and walking at random."""
    env.reset(seed=0)
    random = np.random.default_rng(0)

    def work() -> int:
        for action in random.integers(3, size=100).tolist():
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return 100

    return rate(work, seconds)


def measure(seconds: float) -> list[dict[str, Any]]:
    """One row per measurement: what, batch size, steps per second."""
    config = PinpadConfig()
    rows = [("gridworld-pinpad", size, pinpad_rate(config, size, seconds)) for size in BATCH_SIZES]
    rows.append(("gridworld-pinpad, vector env", 1024, vector_env_rate(1024, seconds)))
    rows.append(("gridworld-pinpad, expert episodes", 1024, expert_rate(config, 1024, seconds)))
    try:
        import minigrid  # noqa: F401  (registers its environments)
    except ImportError:
        print("minigrid is not installed: its row is left out (pip install minigrid).")
    else:
        env = gymnasium.make("MiniGrid-Empty-8x8-v0")
        rows.append(("MiniGrid-Empty-8x8-v0, as made", 1, minigrid_rate(env, seconds)))
        rows.append(("MiniGrid-Empty-8x8-v0, unwrapped", 1, minigrid_rate(env.unwrapped, seconds)))
    return [{"environment": name, "batch": batch, "steps_per_second": round(value)} for name, batch, value in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Grid steps per second on one core.")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each row")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out" / "env_steps.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.seconds)
    print(f"{'environment':<36}{'batch':>8}{'steps/s':>14}")
    for row in rows:
        print(f"{row['environment']:<36}{row['batch']:>8}{row['steps_per_second']:>14,}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "rows": rows}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
