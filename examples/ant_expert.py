"""The expert of ant-pinpad: PPO of Stable-Baselines3 over many ants at once; its success; its demonstrations on disk.

    pip install 'metacontroller-rl[ant,expert]'
    python examples/ant_expert.py train RUN [--steps 30000000] [--resume]   # RUN/expert.safetensors, RUN/metrics.jsonl
    python examples/ant_expert.py evaluate RUN/expert.safetensors [--episodes 500]
    python examples/ant_expert.py data RUN/expert.safetensors [--preset ant-laptop] [--out datasets/ant]

Its reward is that of the task, and at every step the dot product of the ant's velocity, in meters a second, with the
direction that it is told (§4), by a weight; an ant that falls or goes where it may not loses some (our choice: without
it the ant learns to leap, which ends soon). Observations and rewards are divided by running statistics. A checkpoint
holds them with policy, optimizer, episodes and random states: a run that is resumed ends bit for bit like one that was
never interrupted. With another number of ants it resumes with new episodes. No file holds code.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from metacontroller.domains.ant_pinpad.dataset import versions
from metacontroller.domains.ant_pinpad.domain import AntPinpad, AntPinpadConfig
from metacontroller.domains.ant_pinpad.engine import ant_model, mujoco
from metacontroller.domains.ant_pinpad.expert import FEATURES, HIDDEN, LIMIT, Expert, Guide, play
from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.observation import NUM_ACTIONS
from metacontroller.domains.ant_pinpad.simulator import STEP_SECONDS, AntBatch, start_ants
from metacontroller.domains.base import Split
from metacontroller.domains.pinpad.tasks import A2_POST, TABLE_A2, Task, format_task
from metacontroller.presets import ant
from metacontroller.storage.manifest import replacing
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.training_state import (
    load_module,
    load_optimizer,
    module_tensors,
    optimizer_meta,
    optimizer_tensors,
)
from metacontroller.storage.versions import check_versions

CHECKPOINT = "expert_training"
WINDOW = 1024
"""Episodes over which success is averaged."""
RATE_STEP, RATES = 1.5, (1e-5, 1e-2)
"""By how much the learning rate changes after an update, and its limits."""
CHUNK = 250
"""Episodes that are evaluated at a time."""


class Statistics:
    """Mean and variance of all vectors seen so far."""

    def __init__(self, size: int) -> None:
        self.mean, self.variance = torch.zeros(size).double(), torch.ones(size).double()
        self.count = torch.tensor(1e-4).double()

    def add(self, values: Tensor) -> None:
        """values (n, size)."""
        values = values.double()
        count, mean, variance = len(values), values.mean(0), values.var(0, unbiased=False)
        total, apart = self.count + count, mean - self.mean
        spread = self.variance * self.count + variance * count + apart.square() * self.count * count / total
        self.mean, self.variance, self.count = self.mean + apart * count / total, spread / total, total

    @property
    def std(self) -> Tensor:
        return (self.variance + 1e-8).sqrt()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.{name}": value for name, value in vars(self).items()}

    def restore(self, tensors: dict[str, Tensor], prefix: str) -> None:
        for name in vars(self):
            setattr(self, name, tensors[f"{prefix}.{name}"])


class GuidedAnts(VecEnv):
    """Many ants with the expert's observations and reward, for Stable-Baselines3. A row that ends starts anew at once.

    bonus: weight of the velocity along the way. penalty: of an ending other than success and time. gamma: for the
    running scale of rewards. speeds: that velocity in meters a second, of each step since it was last read, the mean
    of all ants.
    """

    def __init__(
        self,
        arena: Arena,
        tasks: Sequence[Task],
        rows: int,
        *,
        bonus: float,
        penalty: float,
        gamma: float,
        seed: int,
        threads: int,
    ) -> None:
        self.render_mode = None
        box = spaces.Box(-LIMIT, LIMIT, (FEATURES,), np.float32)
        super().__init__(rows, box, spaces.Box(-1.0, 1.0, (NUM_ACTIONS,), np.float32))
        self.arena, self.tasks, self.threads = arena, tasks, threads
        self.bonus, self.penalty, self.gamma = bonus, penalty, gamma
        self.generator = torch.Generator().manual_seed(seed)
        self.features, self.returns = Statistics(FEATURES), Statistics(1)
        self.returned = torch.zeros(rows).double()
        self.speeds: list[float] = []
        self.actions = np.zeros(0)
        self.width = max(map(len, tasks))
        self._begin()

    def _begin(self) -> None:
        self.ants = self._start(self.num_envs)
        self.guide = Guide(self.ants)

    def _start(self, count: int) -> Any:
        drawn = torch.randint(len(self.tasks), (count,), generator=self.generator).tolist()
        tasks = [self.tasks[index] for index in drawn]
        return start_ants(self.arena, tasks, self.generator, self.threads, width=self.width)

    def episodes(self) -> dict[str, Tensor]:
        """All that the next steps depend on, but for the statistics."""
        rows = {f"ants.{name}": getattr(self.ants, name) for name in AntBatch.row_fields}
        return {**rows, "ants.returned": self.returned, "ants.generator": self.generator.get_state()}

    def restore_episodes(self, tensors: dict[str, Tensor]) -> None:
        """Goes on with what `episodes` returned."""
        for name in AntBatch.row_fields:
            setattr(self.ants, name, tensors[f"ants.{name}"].clone())
        self.guide = Guide(self.ants)
        self.returned = tensors["ants.returned"].clone()
        self.generator.set_state(tensors["ants.generator"].clone())

    def _normalized(self, features: Tensor) -> np.ndarray:
        return ((features - self.features.mean) / self.features.std).clamp(-LIMIT, LIMIT).float().numpy()

    def reset(self) -> np.ndarray:
        """Starts an episode in every row."""
        self._begin()
        self.returned.zero_()
        features = self.guide.features()
        self.features.add(features)
        return self._normalized(features)

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions for `step_wait`."""
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """One step of every ant."""
        ants = self.ants
        before, way = ants.state[:, :2], self.guide.way()
        solved = ants.step(self.guide.torques(torch.from_numpy(self.actions)))
        speed = ((ants.state[:, :2] - before) / STEP_SECONDS * way).sum(1)
        self.speeds.append(float(speed.mean()))
        reward = solved.double() + self.bonus * speed - self.penalty * (ants.terminated & ~ants.success)
        self.returned = self.gamma * self.returned + reward
        self.returns.add(self.returned[:, None])
        ended = ants.terminated | ants.truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        rows = ended.nonzero().squeeze(1)
        if len(rows):
            last = self._normalized(self.guide.features())
            for row in rows.tolist():
                infos[row] = {
                    "terminal_observation": last[row],
                    "TimeLimit.truncated": bool(ants.truncated[row]),
                    "is_success": bool(ants.success[row]),
                    "steps": int(ants.steps[row]),
                }
            self.returned[rows] = 0.0
            ants.replace(rows, self._start(len(rows)))
            self.guide.renew(rows)
        features = self.guide.features()
        self.features.add(features)
        scaled = (reward / self.returns.std).clamp(-LIMIT, LIMIT).float().numpy()
        return self._normalized(features), scaled, ended.numpy(), infos

    def close(self) -> None:
        """There is nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """This object's attribute, once for each row."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Rows have no attributes of their own."""
        raise NotImplementedError

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Rows have no methods of their own."""
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Never."""
        return [False for _ in self._get_indices(indices)]


class Rate:
    """The learning rate; with ``kl``, the divergence that an update shall have, it rises and falls to keep it."""

    def __init__(self, value: float, kl: float | None) -> None:
        self.value, self.kl = value, kl

    def __call__(self, _: float) -> float:
        return self.value

    def adapt(self, kl: float) -> None:
        """After an update that moved the policy by so many nats."""
        if self.kl is not None:
            factor = 1 / RATE_STEP if kl > 2 * self.kl else RATE_STEP if kl < self.kl / 2 else 1.0
            self.value = min(RATES[1], max(RATES[0], self.value * factor))


class Keep(BaseCallback):
    """Logs every update, and keeps a checkpoint and the expert every so many of them."""

    def __init__(self, run: RunFolder, rate: Rate, every: int, updates: int) -> None:
        super().__init__()
        self.run, self.rate, self.every, self.updates = run, rate, every, updates
        self.solved: deque[bool] = deque(maxlen=WINDOW)
        self.steps: deque[int] = deque(maxlen=WINDOW)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "is_success" in info:
                self.solved.append(info["is_success"])
                self.steps.append(info["steps"])
        return True

    def _on_rollout_end(self) -> None:
        """Before the update with what was just played."""
        ants: Any = self.training_env
        speed = float(np.mean(ants.speeds))
        ants.speeds.clear()
        if self.solved:
            success, length = float(np.mean(self.solved)), float(np.mean(self.steps))
            self.run.log_metrics("expert", self.num_timesteps, success=success, episode_steps=length, speed=speed)
            print(
                f"{self.num_timesteps:>12,} steps  success {success:.3f}  {length:.0f} steps an episode  "
                f"{speed:.2f} m/s along the way  lr {self.rate.value:.0e}",
                flush=True,
            )

    def _on_rollout_start(self) -> None:
        """After an update."""
        self.updates += 1
        self.rate.adapt(self.logger.name_to_value.get("train/approx_kl", self.rate.kl or 0.0))
        if self.updates % self.every == 0:
            self.save()

    def save(self) -> None:
        """Writes the checkpoint, and the expert beside it."""
        model: Any = self.model
        ants: Any = self.training_env
        tensors = {
            **module_tensors("policy", model.policy),
            **optimizer_tensors("optimizer", model.policy.optimizer),
            **ants.features.tensors("features"),
            **ants.returns.tensors("returns"),
            **ants.episodes(),
            **learner_state(model),
            "window.solved": torch.tensor(list(self.solved), dtype=torch.bool),
            "window.steps": torch.tensor(list(self.steps), dtype=torch.int64),
        }
        meta = {"optimizer": optimizer_meta(model.policy.optimizer), "steps": self.num_timesteps}
        self.run.save_checkpoint(CHECKPOINT, tensors, {**meta, "updates": self.updates, "rate": self.rate.value})
        about = {"versions": versions(), "arena": vars(ants.arena), "steps": self.num_timesteps}
        with replacing(self.run.path / "expert.safetensors") as draft:
            exported(model.policy, ants.features).save(draft, about)


def learner_state(learner: Any) -> dict[str, Tensor]:
    """What PPO saw last, and the random states from which it samples actions and minibatches."""
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (the library draws from it)
    return {
        "last.observation": torch.from_numpy(learner._last_obs),
        "last.starts": torch.from_numpy(learner._last_episode_starts),
        "random.torch": torch.get_rng_state(),
        "random.numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"]]),
    }


def restore_learner(learner: Any, tensors: dict[str, Tensor]) -> None:
    """Goes on with what `learner_state` returned."""
    learner._last_obs = tensors["last.observation"].clone().numpy()
    learner._last_episode_starts = tensors["last.starts"].clone().numpy()
    torch.set_rng_state(tensors["random.torch"].clone())
    *keys, place = tensors["random.numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), place, 0, 0.0))  # noqa: NPY002


def exported(policy: Any, features: Statistics) -> Expert:
    """The expert that acts as a policy of Stable-Baselines3 does on normalized features."""
    expert = Expert(len(features.mean))
    with torch.no_grad():
        expert.body.load_state_dict(policy.mlp_extractor.policy_net.state_dict())
        expert.head.load_state_dict(policy.action_net.state_dict())
        expert.log_std.copy_(policy.log_std)
        expert.mean.copy_(features.mean)
        expert.std.copy_(features.std)
    return expert


@contextmanager
def integrator(euler: bool) -> Iterator[None]:
    """With ``euler``, MuJoCo integrates by Euler's method meanwhile: three times as many steps in the same time."""
    options = ant_model().opt
    before = options.integrator
    options.integrator = mujoco.mjtIntegrator.mjINT_EULER if euler else before
    try:
        yield
    finally:
        options.integrator = before


def train(arguments: argparse.Namespace) -> None:
    """Trains, or resumes."""
    run = RunFolder(arguments.run)
    run.versions = versions()
    with run.locked(), integrator(arguments.euler):
        train_in(run, arguments)


def train_in(run: RunFolder, arguments: argparse.Namespace) -> None:
    """The same in a run that is this process's alone."""
    arena = Arena(cell_size=arguments.cell_size)
    run.begin(CHECKPOINT, resume=arguments.resume)
    none: tuple[dict[str, Tensor], dict[str, Any]] = ({}, {"updates": 0, "rate": arguments.lr})
    tensors, meta = run.load_checkpoint(CHECKPOINT) if run.has_checkpoint(CHECKPOINT) else none
    seed = arguments.seed * 2**20 + meta["updates"]
    ants = GuidedAnts(
        arena,
        [*TABLE_A2, A2_POST],
        arguments.rows,
        bonus=arguments.bonus,
        penalty=arguments.penalty,
        gamma=arguments.gamma,
        seed=seed,
        threads=arguments.threads,
    )
    rate = Rate(meta["rate"], arguments.kl)
    learner = PPO(
        "MlpPolicy",
        ants,
        n_steps=arguments.steps_per_update,
        batch_size=min(arguments.batch_size, arguments.steps_per_update * arguments.rows),
        n_epochs=arguments.epochs,
        learning_rate=rate,
        gamma=arguments.gamma,
        ent_coef=arguments.entropy,
        policy_kwargs={
            "net_arch": list(HIDDEN),
            "activation_fn": nn.Tanh,
            "log_std_init": arguments.log_std,
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": arguments.weight_decay},
        },
        seed=seed,
        device=arguments.device,
    )
    if tensors:
        load_module(learner.policy, tensors, "policy")
        load_optimizer(learner.policy.optimizer, tensors, meta["optimizer"], "optimizer")
        ants.features.restore(tensors, "features")
        ants.returns.restore(tensors, "returns")
        learner.num_timesteps = meta["steps"]
        run.rewind_metrics("expert", meta["steps"])
    left = arguments.steps - learner.num_timesteps
    if left > 0:
        keep = Keep(run, rate, arguments.checkpoint_every, meta["updates"] - 1)  # the first rollout follows no update
        rows = [len(tensors.get(f"ants.{name}", ())) for name in AntBatch.row_fields]  # none of an older version
        if set(rows) == {arguments.rows}:
            ants.restore_episodes(tensors)
            restore_learner(learner, tensors)
            keep.solved.extend(tensors["window.solved"].tolist())
            keep.steps.extend(tensors["window.steps"].tolist())
        learner.learn(left, callback=keep, reset_num_timesteps=False)
        keep.updates += 1
        keep.save()


def played(
    expert: Expert, arena: Arena, tasks: Sequence[Task], episodes: int, seed: int, sampled: bool
) -> dict[str, float]:
    """With mean actions or sampled ones, each episode of a random task of those: share solved, steps of those that
    were."""
    generator, solved, steps = torch.Generator().manual_seed(seed), 0, 0
    for start in range(0, episodes, CHUNK):
        count = min(CHUNK, episodes - start)
        drawn = torch.randint(len(tasks), (count,), generator=generator).tolist()
        ants = start_ants(arena, [tasks[index] for index in drawn], generator)
        play(ants, expert, generator if sampled else None)
        solved += int(ants.success.sum())
        steps += int(ants.steps[ants.success].sum())
    return {"success": solved / episodes, "steps": steps / max(1, solved)}


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints success on both sets of tasks, on the plane that the expert was trained on, as JSON."""
    expert, about = Expert.load(arguments.expert)
    check_versions(arguments.expert, about.get("versions", {}), versions())
    arena = Arena(**about["arena"])
    found: dict[str, Any] = {"about": about, "episodes": arguments.episodes}
    for name, tasks in (("table A2", TABLE_A2), (format_task(A2_POST), (A2_POST,))):
        rest = (expert, arena, tasks, arguments.episodes, arguments.seed)
        found[name] = {"mean_actions": played(*rest, False), "sampled_actions": played(*rest, True)}
    print(json.dumps(found, indent=2))


def data(arguments: argparse.Namespace) -> None:
    """Writes the demonstrations that a preset reads, if they are not there, and says where."""
    _, about = Expert.load(arguments.expert)
    world = ant.PRESETS[arguments.preset.removeprefix("ant-")]().domain
    assert isinstance(world, AntPinpadConfig)
    config = replace(
        world,
        cell_size=about["arena"]["cell_size"],
        expert=str(arguments.expert),
        episodes=arguments.episodes,
        dataset=str(arguments.out),
        dataset_seed=arguments.seed,
        only_successes=not arguments.keep_failures,
    )
    for split in get_args(Split):
        store = AntPinpad(config).store(split)
        print(f"{split}: {store.path}, {len(store)} episodes of {store.meta['played']} played")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train", help="train the expert")
    one.add_argument("run", type=Path)
    one.add_argument("--steps", type=int, default=30_000_000, help="of the environment, all together")
    one.add_argument("--resume", action="store_true")
    one.add_argument("--rows", type=int, default=256, help="ants at once")
    one.add_argument("--steps-per-update", type=int, default=32, help="of each ant")
    one.add_argument("--batch-size", type=int, default=2048, help="steps in a minibatch")
    one.add_argument("--epochs", type=int, default=5)
    one.add_argument("--lr", type=float, default=3e-4, help="the paper's")
    one.add_argument("--weight-decay", type=float, default=0.03, help="the paper's")
    one.add_argument("--entropy", type=float, default=3e-4, help="the paper's")
    one.add_argument("--kl", type=float, default=0.01, help="nats of an update; the learning rate is led by it")
    one.add_argument("--log-std", type=float, default=-1.0, help="of the new policy")
    one.add_argument("--gamma", type=float, default=0.99)
    one.add_argument("--bonus", type=float, default=0.1, help="weight of the velocity along the way")
    one.add_argument("--penalty", type=float, default=4.0, help="of an episode that ends before its task and its time")
    one.add_argument("--cell-size", type=float, default=Arena().cell_size, help="side of a cell, in meters")
    one.add_argument(
        "--euler", action="store_true", help="quicker physics than the world's: end with --resume without it"
    )
    one.add_argument("--checkpoint-every", type=int, default=20, help="updates")
    one.add_argument("--threads", type=int, default=0, help="of MuJoCo; 0 is one a core")
    one.add_argument("--device", default="cpu", help="of the network; elsewhere a resumed run draws other numbers")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run_command=train)
    two = commands.add_parser("evaluate", help="success of the expert")
    two.add_argument("expert", type=Path)
    two.add_argument("--episodes", type=int, default=500, help="for each set of tasks")
    two.add_argument("--seed", type=int, default=1)
    two.set_defaults(run_command=evaluate)
    three = commands.add_parser("data", help="write the demonstrations of both phases")
    three.add_argument("expert", type=Path)
    three.add_argument("--preset", default="ant-laptop", choices=[f"ant-{name}" for name in ant.PRESETS])
    three.add_argument("--episodes", type=int, default=AntPinpadConfig().episodes, help="for each phase")
    three.add_argument("--out", type=Path, default=Path("datasets/ant"))
    three.add_argument("--keep-failures", action="store_true")
    three.add_argument("--seed", type=int, default=0)
    three.set_defaults(run_command=data)
    arguments = parser.parse_args()
    arguments.run_command(arguments)


if __name__ == "__main__":
    main()
