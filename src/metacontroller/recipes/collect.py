"""Episodes of a policy of the user's in a Gymnasium environment, as a dataset on disk.

    OUT/collect.json           what was asked for, until the dataset is whole
    OUT/parts/part-00000 ...   episodes already played, up to `PART` attempts each; removed when the dataset is whole
    OUT/store.json, *.npy      the dataset (`TrajectoryStore`)

Attempt number i has the seed i of a sequence that the config's seed begins, so the episodes are the same for any number
of workers.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metacontroller.arguments import checked_kinds
from metacontroller.data.datasets import space_meta
from metacontroller.data.spaces import encode_actions, encode_observations, stack
from metacontroller.data.store import HEADER, TrajectoryStore
from metacontroller.data.trajectories import Episodes
from metacontroller.domains.border import Misfit, fitted
from metacontroller.domains.guarded_environment import Guard, GuardedEnvironment, environment_facts, environment_id
from metacontroller.errors import UserError
from metacontroller.ranges import Count, CountOr0, Processes, Steps, check_fields
from metacontroller.recipes.jobs import in_processes
from metacontroller.storage.config_file import from_plain
from metacontroller.storage.files import left_behind, plain, read_json
from metacontroller.storage.lock import locked
from metacontroller.storage.manifest import check_seal, seal, write_text
from metacontroller.storage.user_function import code_of_the_user, import_user_function
from metacontroller.training.progress import announce, track

PART = 64
"""Attempts in one part: what an interrupt can cost."""

MOST_ATTEMPTS = 50
"""Attempts for each episode asked for before the policy, or the environment, is said to fail."""

MAX_STEPS = 100_000
"""Steps after which an episode of an environment without a time limit is truncated."""

FIELDS = ("states", "actions", "rewards", "terminated", "truncated")
"""Of `Trajectories`, what is recorded."""

Policy = Callable[[Any, Any], Any]
"""(observation, environment) -> action."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """The episodes that are asked for."""

    env: str
    """Gymnasium ID; module:ID where importing a module of yours registers it."""
    policy: str
    """Your function as package.module:function: it takes an observation and the environment, and returns an action."""
    episodes: Count
    """Episodes to keep."""
    only_successes: bool = False
    """Keep episodes that succeed alone, as `evaluate` counts success."""
    success_return: float | None = None
    """The return that counts as success where the environment's info does not say; a positive reward at termination
    unless given."""
    env_kwargs: str | None = None
    """Keywords with which the environment is made, as JSON, such as '{"is_slippery": false}'."""
    max_steps: Steps | None = None
    """Steps after which an episode is truncated; the environment's own limit unless given."""
    seed: CountOr0 = 0
    """From which each episode's seed derives; the episodes do not depend on --workers."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Part:
    """What a part says of itself: how many episodes were played and lost to the environment, and of those that are
    kept the return, success and length."""

    played: int
    lost: int
    returns: tuple[float, ...]
    success: tuple[bool, ...]
    lengths: tuple[int, ...]


@checked_kinds
def collect(
    config: CollectConfig, out: Path, *, workers: Processes = 1, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Plays the episodes and writes the dataset to ``out``.

    Returns counts over the episodes that were played for it: kept, played, lost (to exceptions of the environment),
    unsolved (and left out therefore), surplus (more than asked for) and steps (of those kept), and of those kept
    success, mean_return and its standard error return_se.
    UserError for a folder of something else, for one that is begun without ``resume``, and for a policy that hardly
    ever succeeds where only successes are kept.
    """
    import_user_function("policy", config.policy)
    if environment_facts(config.env, config.env_kwargs).max_steps is None and config.max_steps is None:
        said = f"{config.env} has no time limit: an episode may take {MAX_STEPS:,} steps; --max-steps sets another"
        announce(f"collect: {said}", quiet=quiet)
    with locked(out):
        _open(config, out, resume)
        if not (out / HEADER).exists():
            jobs = [(config, out, rank, workers, quiet) for rank in range(workers)]
            if workers == 1:
                _play_parts(*jobs[0])
            else:
                in_processes(_play_parts, jobs, at_once=workers)
            _join(config, out)
        if (out / "parts").exists():
            shutil.rmtree(out / "parts")
        (out / "collect.json").unlink(missing_ok=True)
    return TrajectoryStore(out).meta["collected"]


def _open(config: CollectConfig, out: Path, resume: bool) -> None:
    """Writes down what is asked for; UserError unless the folder is new, or was begun so and is to be resumed."""
    request, done = out / "collect.json", (out / HEADER).exists()
    if not done and not any((out / "parts").glob("*.json")):  # nothing was played, or to the end of no part
        begun = (request.name, "parts")
        if out.is_dir() and any(path.name not in begun and not left_behind(path) for path in out.iterdir()):
            raise UserError(f"{out} holds files of something else; choose another --out.")
        write_text(request, json.dumps(seal(plain(config)), indent=2))
        return
    if not resume:
        raise UserError(f"{out} holds episodes; add --resume to go on there, or choose another --out.")
    before = TrajectoryStore(out).meta.get("asked") or {} if done else check_seal(request, read_json(request))
    if plain(config) != {name: before.get(name) for name in plain(config)}:  # options may be newer than the folder
        raise UserError(f"{out} was started with other options, {before}; repeat those, or choose another --out.")


def _join(config: CollectConfig, out: Path) -> None:
    """Writes the first episodes of the parts as one dataset."""
    parts: list[Part] = []
    paths = _finished(out)
    while _kept(parts) < config.episodes:  # how many more were played depends on which of the workers was quicker
        parts.append(_read_part(paths[len(parts)]))
    returns, success, lengths = (
        np.array([*itertools.chain(*columns)][: config.episodes])
        for columns in zip(*((part.returns, part.success, part.lengths) for part in parts), strict=True)
    )
    played, lost = (sum(getattr(part, name) for part in parts) for name in ("played", "lost"))
    collected = {
        "kept": len(returns),
        "played": played,
        "lost": lost,
        "unsolved": played - lost - _kept(parts),
        "surplus": _kept(parts) - len(returns),
        "steps": int(lengths.sum()),
        "success": float(success.mean()),
        "mean_return": float(returns.mean()),
        "return_se": float(returns.std(ddof=1) / math.sqrt(len(returns))) if len(returns) > 1 else None,
    }
    facts = environment_facts(config.env, config.env_kwargs)
    meta = {
        **space_meta(facts.observation_space, facts.action_space, environment_id(config.env)),
        "env_kwargs": facts.kwargs,
        "env_steps": config.max_steps or facts.max_steps,
        "versions": facts.versions,
        "asked": plain(config),
        "collected": collected,
    }
    stores = [TrajectoryStore(path.with_suffix("")) for part, path in zip(parts, paths, strict=False) if part.lengths]
    TrajectoryStore.join(out, stores, meta, most=config.episodes, beside=("collect.json", "parts"))


def _kept(parts: list[Part]) -> int:
    return sum(len(part.lengths) for part in parts)


# -- playing ----------------------------------------------------------------------------------------------------------


def _play_parts(config: CollectConfig, out: Path, rank: int, workers: int, quiet: bool) -> None:
    """One worker's parts: every so many, until all workers together have kept enough."""
    policy = import_user_function("policy", config.policy)
    env = Guard(GuardedEnvironment(environment_id(config.env), config.success_return, config.env_kwargs))

    def answer(observation: Any, environment: Any) -> Any:
        with code_of_the_user("policy", config.policy):
            chosen = policy(observation, environment)
        try:
            return deepcopy(fitted(environment.action_space, chosen, f"an action of policy {config.policy!r}"))
        except Misfit as error:
            raise UserError(f"{error}; mend the policy.") from error

    size = math.ceil(config.episodes / math.ceil(config.episodes / PART))
    parts: list[Part] = []
    with track(config.episodes, "collect", start=0, quiet=quiet or rank > 0) as progress:
        for index in itertools.count(rank, workers):
            parts += [_read_part(path) for path in _finished(out, len(parts))]  # each once
            progress.update(min(_kept(parts), config.episodes))
            if _kept(parts) >= config.episodes:
                break
            if index * size > MOST_ATTEMPTS * (config.episodes + PART * workers):
                raise _hopeless(config, parts)
            if not _part(out, index).exists():
                _play_part(config, env, answer, _part(out, index), range(index * size, (index + 1) * size))
    env.close()


def _hopeless(config: CollectConfig, parts: list[Part]) -> UserError:
    """What to mend where hardly any episode can be kept."""
    played, lost = (sum(getattr(part, name) for part in parts) for name in ("played", "lost"))
    way = f"mend the policy {config.policy}, state --success-return, or leave out --only-successes"
    if 2 * lost > played:
        way = f"mend the environment {config.env}, which said why it lost them"
    return UserError(
        f"{_kept(parts)} of {played} episodes were kept, {lost} were lost to the environment, and "
        f"{config.episodes} are asked for; {way}."
    )


def _part(out: Path, index: int) -> Path:
    """What a part says of itself; its episodes stand beside it, in a folder."""
    return out / "parts" / f"part-{index:05}.json"


def _read_part(path: Path) -> Part:
    """What a part says of itself; UserError for one that was changed."""
    return from_plain(Part, check_seal(path, read_json(path)), str(path))


def _finished(out: Path, first: int = 0) -> list[Path]:
    """The parts from number ``first`` up to the first that is missing, which other workers may have overtaken."""
    return list(itertools.takewhile(Path.exists, (_part(out, index) for index in itertools.count(first))))


def _play_part(config: CollectConfig, env: Guard, policy: Policy, path: Path, attempts: range) -> None:
    """Plays some attempts and writes those that are kept."""
    limit = config.max_steps or MAX_STEPS
    played = [_play(env, policy, _seed(config.seed, attempt), limit) for attempt in attempts]
    sound = [episode for episode in played if not episode["lost"]]
    chosen = [episode for episode in sound if episode["success"] or not config.only_successes]
    if chosen:
        rows = ({name: episode[name] for name in FIELDS} for episode in chosen)
        TrajectoryStore.join(path.with_suffix(""), [Episodes.of_rows(enumerate(rows))])
    part = Part(
        played=len(played),
        lost=len(played) - len(sound),
        returns=tuple(float(episode["rewards"].sum()) for episode in chosen),
        success=tuple(episode["success"] for episode in chosen),
        lengths=tuple(len(episode["rewards"]) for episode in chosen),
    )
    write_text(path, json.dumps(seal(plain(part))))


def _play(env: Guard, policy: Policy, seed: int, max_steps: int) -> dict[str, Any]:
    """One episode: success and lost, and unless it is lost the fields of `Trajectories`."""
    env.reset(seed, max_steps)
    env.env.action_space.seed(seed)  # of this very environment, which is new where the last one raised
    observations, actions, rewards = [deepcopy(env.read)], [], []  # environments may write into what they returned
    while not env.ended:
        action = policy(env.last, env.env)
        rewards.append(env.step(action))
        observations.append(deepcopy(env.read))
        actions.append(action)
    if env.flags["lost"]:
        return {**env.flags}
    seen, taken = env.maker.facts[:2]
    return {
        "states": encode_observations(seen, stack(seen, observations)),
        "actions": encode_actions(taken, actions),
        "rewards": np.array(rewards),
        **env.flags,
    }


def _seed(seed: int, attempt: int) -> int:
    return int(np.random.SeedSequence([seed, attempt]).generate_state(1)[0] >> 1)
