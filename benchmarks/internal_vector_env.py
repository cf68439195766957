"""How fast is internal RL behind Gymnasium's interface? Steps of the inner environment a second, one policy in all.

The batched rollout of the phase, `InternalVectorEnv` with as many rows, the same for Stable-Baselines3 if it is
installed, and copies of `InternalEnv` stepped in turn, as its libraries step them. Codes are the prior's or those of
the run's policy; its cost is counted everywhere. The rollout plays every episode to its end, so its last steps are of
few rows; the vector environment begins new ones, and its waiting is for the slowest row of each step. Seconds are those
of this process on a core, so that other work on the machine counts less. Rounds alternate; prints medians and writes
JSON.

    python benchmarks/internal_vector_env.py [RUN] [--rows 256] [--rounds 5] [--output FILE.json]

RUN: a run folder with a metacontroller; that of ``make reproduce`` unless given, and if that is not there nothing is
measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from metacontroller import InternalEnv, MetaController
from metacontroller.domains.base import BatchedEnv
from metacontroller.environments.internal_vector_env import InternalVectorEnv
from metacontroller.models.readouts import sample_gaussian
from metacontroller.phases.rollout import policy_proposal, prior_proposal, rollout_abstract
from metacontroller.recipes.config import load_run, read_config
from metacontroller.storage.run_folder import RunFolder

COPIES = 8
LIMIT = 1_000_000


class OneEpisode(gymnasium.Env[np.ndarray, np.int64]):
    """One row of a world as a Gymnasium environment that shows the model's own states."""

    def __init__(self, start: Callable[[], BatchedEnv], actions: int) -> None:
        self.start = start
        self.action_space = gymnasium.spaces.Discrete(actions)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Tensor, dict[str, Any]]:  # pyright: ignore
        self.row = self.start()
        return self.row.observation[0], {}

    def step(self, action: np.int64) -> tuple[Tensor, float, bool, bool, dict[str, Any]]:  # pyright: ignore
        reward = float(self.row.step(torch.tensor([int(action)])))
        return self.row.observation[0], reward, bool(self.row.terminated), bool(self.row.truncated), {}


class Codes:
    """Codes of a policy for rows that begin again at times of their own, or of the prior."""

    def __init__(self, meta_controller: MetaController, rows: int, prior: bool) -> None:
        self.policy, self.prior = meta_controller.policy, prior
        self.width, self.state = meta_controller.dim_latent, meta_controller.policy.initial_state(rows)

    @torch.no_grad()
    def __call__(self, residual: np.ndarray, began: np.ndarray) -> np.ndarray:
        if self.prior:
            return torch.randn(len(residual), self.width).numpy()
        self.state[torch.from_numpy(began)] = 0.0
        distribution, self.state = self.policy(torch.from_numpy(residual)[:, None], self.state)
        return sample_gaussian(distribution[:, 0]).clamp(-5, 5).numpy()


def rollout_rate(run: Any, meta_controller: MetaController, rows: int, seconds: float, prior: bool) -> float:
    """Inner steps a second of batches of episodes."""
    generator, steps, start = torch.Generator().manual_seed(0), 0, time.process_time()
    propose = (prior_proposal if prior else policy_proposal)(meta_controller, generator)
    while time.process_time() - start < seconds:
        env = run.domain.reset(rows, generator)
        steps += int(rollout_abstract(run.model, meta_controller, env, propose, generator).steps.sum())
    return steps / (time.process_time() - start)


def vector_rate(run: Any, meta_controller: MetaController, rows: int, seconds: float, prior: bool) -> float:
    """The same of the vector environment, after steps in which its rows spread over their episodes."""
    env, codes = InternalVectorEnv(run.domain, run.model, meta_controller, rows), Codes(meta_controller, rows, prior)
    residual, _ = env.reset(seed=0)
    ended, steps, start = np.ones(rows, bool), 0, time.process_time()
    for count in range(LIMIT):
        if count == 5:
            steps, start = 0, time.process_time()
        residual, _, terminated, truncated, info = env.step(codes(residual, ended))
        ended = terminated | truncated
        steps += int(info["steps"].sum())
        if ended.any():
            steps += int(info["final_info"]["steps"][ended].sum())
        if count > 5 and time.process_time() - start > seconds:
            break
    return steps / (time.process_time() - start)


def adapter_rate(run: Any, meta_controller: MetaController, rows: int, seconds: float, prior: bool) -> float | None:
    """The same behind Stable-Baselines3's interface, None if it is not installed."""
    try:
        import stable_baselines3  # noqa: F401
    except ImportError:
        return None
    from metacontroller.environments.stable_baselines import StableBaselinesEnv

    env = StableBaselinesEnv(InternalVectorEnv(run.domain, run.model, meta_controller, rows))
    codes = Codes(meta_controller, rows, prior)
    env.seed(0)
    residual, ended, steps, start = env.reset(), np.ones(rows, bool), 0, time.process_time()
    for count in range(LIMIT):
        if count == 5:
            steps, start = 0, time.process_time()
        residual, _, ended, infos = env.step(codes(np.asarray(residual), ended))
        steps += sum(info["steps"] for info in infos)
        if count > 5 and time.process_time() - start > seconds:
            break
    return steps / (time.process_time() - start)


def copies_rate(run: Any, meta_controller: MetaController, rows: int, seconds: float, prior: bool) -> float:
    """The same of ``rows`` copies of `InternalEnv`, stepped one after the other."""
    generator = torch.Generator().manual_seed(0)
    inner = [
        OneEpisode(lambda: run.domain.reset(1, generator), run.domain.spec().action["num_discrete"])
        for _ in range(rows)
    ]
    envs = [InternalEnv(env, run.model, meta_controller, encode_observation=lambda seen: seen) for env in inner]
    codes = Codes(meta_controller, rows, prior)
    residual = np.stack([env.reset(seed=row)[0] for row, env in enumerate(envs)])
    ended, steps, start = np.ones(rows, bool), 0, time.process_time()
    while time.process_time() - start < seconds:
        began, ended = ended, np.zeros(rows, bool)
        for row, (env, code) in enumerate(zip(envs, codes(residual, began), strict=True)):
            residual[row], _, terminated, truncated, info = env.step(code)
            steps += info["steps"]
            ended[row] = terminated or truncated
            if ended[row]:
                residual[row] = env.reset()[0]
    return steps / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/quick/seed-0"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out" / "internal_vector_env.json")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run)
    if not (folder.path / "meta_controller.safetensors").exists():
        print(f"not measured: {arguments.run} holds no metacontroller.")
        return
    torch.set_num_threads(arguments.threads)
    run = load_run(folder, "cpu", read_config(folder))
    kinds: dict[str, Any] = {"prior": run.meta_controller}
    if (folder.path / "internal_rl_policy.safetensors").exists():
        kinds["internal-rl"] = run.policy
    measures = {
        "rollout": (rollout_rate, arguments.rows),
        "InternalVectorEnv": (vector_rate, arguments.rows),
        "Stable-Baselines3": (adapter_rate, arguments.rows),
        f"InternalEnv x {COPIES}": (copies_rate, COPIES),
    }
    rows = []
    for codes, meta_controller in kinds.items():
        meta_controller.eval()
        found: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for name, (measure, width) in measures.items():
                rate = measure(run, meta_controller, width, arguments.seconds, codes == "prior")
                if rate is not None:
                    found.setdefault(name, []).append(rate)
        base = statistics.median(found["rollout"])
        for name, rates in found.items():
            rate = statistics.median(rates)
            rows.append(
                {"codes": codes, "what": name, "steps_per_second": rate, "of_rollout": rate / base, "all": rates}
            )
            print(f"{codes:>12} {name:<18} {rate:>9,.0f} steps/s, {rate / base:6.1%} of the rollout")
    report = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "rows": arguments.rows,
        "rates": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
