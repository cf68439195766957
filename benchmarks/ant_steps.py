"""How many steps a second does the ant make? In batches on MuJoCo's threads, beside Gymnasium's AsyncVectorEnv.

First environments with their observations, endings and new episodes: `AntPinpadVectorEnv`, the single environment in an
`AsyncVectorEnv` (one process each), and Gymnasium's own Ant-v5 in one. Then the physics alone, 0.05 s a step for the
same states: MuJoCo's `rollout`, which this world uses; a pool of Python threads, each over data of its own; and
MuJoCo's `Batch`, where its version has one. Random torques. Rounds over all rows are repeated, and the median of each
is kept. Prints a table and writes JSON. Needs the extra ``ant``.

    python benchmarks/ant_steps.py [--seconds 3] [--rounds 3] [--output benchmarks/out/ant_steps.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium
import numpy as np
import torch

from metacontroller.domains.ant_pinpad import ENV_ID
from metacontroller.domains.ant_pinpad.engine import FRAME_SKIP, Physics, ant_model, mujoco
from metacontroller.domains.ant_pinpad.gymnasium_env import AntPinpadVectorEnv
from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.simulator import start_ants

Work = Callable[[], int]
"""Does some steps and says how many."""


def rate(work: Work, seconds: float) -> float:
    """Steps per second: `work` is called once unmeasured, then repeatedly."""
    work()
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        done += work()
    return done / elapsed


def environment_work(envs: Any, count: int) -> Work:
    """Steps of a vector environment; those that only start a new episode are counted too, in every kind alike."""
    envs.reset(seed=0)
    random = np.random.default_rng(0)

    def work() -> int:
        envs.step(random.uniform(-1, 1, (count, 8)).astype(np.float32))
        return count

    return work


def asynchronous(name: str, count: int) -> Work:
    """A process for each environment."""
    return environment_work(gymnasium.make_vec(name, num_envs=count, vectorization_mode="async"), count)


class WaysToMove:
    """Several ways to move the same ants."""

    def __init__(self, count: int, threads: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.state = start_ants(Arena(), [()] * count, generator, threads).state.numpy()
        self.action = np.random.default_rng(0).uniform(-1, 1, (count, 8))
        self.threads, self.model = threads, ant_model()

    def rollout(self) -> Work:
        """As in this world."""
        physics = Physics(self.threads)

        def work() -> int:
            physics.advance(self.state, self.action)
            return len(self.state)

        return work

    def thread_pool(self) -> Work:
        """Python's threads, each with data of its own; MuJoCo releases the interpreter's lock."""
        pool = ThreadPoolExecutor(self.threads)
        data = [mujoco.MjData(self.model) for _ in range(self.threads)]
        shares = np.array_split(np.arange(len(self.state)), self.threads)
        moved = np.empty_like(self.state)

        def one(index: int) -> None:
            held = data[index]
            for row in shares[index]:
                held.qpos[:], held.qvel[:] = self.state[row, :15], self.state[row, 15:]
                held.qacc_warmstart[:] = 0
                held.ctrl[:] = self.action[row]
                mujoco.mj_step(self.model, held, nstep=FRAME_SKIP)
                moved[row, :15], moved[row, 15:] = held.qpos, held.qvel

        def work() -> int:
            list(pool.map(one, range(self.threads)))
            return len(self.state)

        return work

    def batch(self) -> Work:
        """MuJoCo's own batch of simulations; ImportError where its version has none."""
        batch = import_module("mujoco.batch").Batch(self.model, len(self.state), self.threads)
        names = ("qpos", "qvel", "qacc_warmstart", "ctrl")
        qpos, qvel, warmstart, control = (batch.bind(name) for name in names)

        def work() -> int:
            qpos[:], qvel[:] = self.state[:, :15], self.state[:, 15:]
            warmstart[:] = 0
            control[:] = self.action
            batch.step(nstep=FRAME_SKIP)
            return len(self.state)

        return work


def rows(threads: int) -> list[tuple[str, int, Work]]:
    """What is measured: name, how many at once, work."""
    made: list[tuple[str, int, Work]] = []
    for count in (64, 256, 1024):
        made.append(("ant-pinpad", count, environment_work(AntPinpadVectorEnv(count, threads=threads), count)))
    for name in (ENV_ID, "Ant-v5"):
        for count in sorted({threads, 16}):
            made.append((f"AsyncVectorEnv of {name.rpartition('/')[2]}", count, asynchronous(name, count)))
    ways = WaysToMove(256, threads)
    made += [("physics: rollout", 256, ways.rollout()), ("physics: thread pool", 256, ways.thread_pool())]
    with suppress(ImportError):
        made.append(("physics: Batch", 256, ways.batch()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Ant steps per second.")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each row in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out" / "ant_steps.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured: list[list[float]] = []
    work = rows(arguments.threads)
    for _ in range(arguments.rounds):
        measured.append([rate(part, arguments.seconds) for _, _, part in work])
    medians = [median(values) for values in zip(*measured, strict=True)]
    print(f"{'what':<36}{'at once':>8}{'steps/s':>12}")
    for (name, count, _), value in zip(work, medians, strict=True):
        print(f"{name:<36}{count:>8}{value:>12,.0f}")
    result = [
        {"what": name, "at_once": count, "steps_per_second": round(value)}
        for (name, count, _), value in zip(work, medians, strict=True)
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"mujoco": mujoco.__version__, "machine": platform.machine(), "threads": arguments.threads}
    arguments.output.write_text(json.dumps({**facts, "rows": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
