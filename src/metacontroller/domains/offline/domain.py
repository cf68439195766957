"""Your own dataset as a world: spaces, lengths and statistics are read from the data; the environment is optional."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from metacontroller.data.datasets import Dataset, load_dataset
from metacontroller.data.spaces import action_options, encoder_options
from metacontroller.data.splits import ValidationSplit
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import Domain, DomainSpec, Split
from metacontroller.domains.guarded_environment import EnvironmentFacts, environment_facts, environment_id, keywords
from metacontroller.domains.gymnasium_adapter import GymnasiumBatch, GymnasiumEnvironments
from metacontroller.errors import UserError
from metacontroller.ranges import Number, ProcessesOr0, Steps, check_fields, shown
from metacontroller.storage.versions import ENVIRONMENT, check_versions, record


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """A dataset, and an environment to act in. UserError for values out of range."""

    dataset: str | None = None
    """The demonstrations: a Minari dataset's ID, a folder that `collect` wrote, or package.module:function."""
    env: str | None = None
    """Gymnasium ID of the environment; none: nothing can act, the rest works."""
    env_kwargs: str | None = None
    """Keywords with which it is made, a JSON object as text; none: those that its ID brings."""
    max_steps: Steps | None = None
    """Steps after which an episode is truncated; none: the environment's limit, or the longest episode of the data."""
    success_return: float | None = None
    """Where the environment's info says nothing of success: the return that counts as one; none: a positive reward at
    termination."""
    workers: ProcessesOr0 = 0
    """Processes in which the environments step; 0: the one that trains."""
    window: Steps = 128
    """Of longer episodes only so many steps are read at once, from a step drawn at random; a model with attention acts
    by its last so many steps too."""
    validation_share: Annotated[float, Number(0, 0.9, noun="share")] = 0.1
    """Share of the episodes on which nothing is trained, for validation: by episode, the same for all phases and seeds.
    0: none, and held-out figures are of episodes that were trained on."""

    def __post_init__(self) -> None:
        if self.dataset is not None and Path(self.dataset).is_dir():
            object.__setattr__(self, "dataset", str(Path(self.dataset).resolve()))  # read from other folders too
        check_fields(self)
        if keywords(self.env_kwargs) and self.env is None:
            raise UserError(f"env_kwargs are {shown(self.env_kwargs)} and there is no env; name one.")


class Offline(Domain):
    """Episodes of a dataset, and those of a Gymnasium environment if there is one."""

    name = "offline"
    Config = OfflineConfig
    config: OfflineConfig

    @cached_property
    def dataset(self) -> Dataset:
        """The demonstrations; UserError without any, or if the environment's spaces are not those of the data."""
        dataset, facts = self._recorded, self._facts
        if facts is None:
            return dataset
        _warn_of_another_world(dataset, self.config, facts)
        fitted = _fitted(dataset, self.config.env, facts)
        check_versions(f"dataset {self.config.dataset}", dataset.record, facts.versions)
        return fitted

    @property
    def _source(self) -> tuple[str, int]:
        """The dataset's name, and when it was last written; UserError without any."""
        name = self.config.dataset
        if name is None:
            raise UserError("no dataset was named; start the run with --dataset ID.")
        if Path(name).is_absolute() and not Path(name).exists():
            raise UserError(
                f"the dataset {name} is not there; if it was moved, name its place by: metacontroller discover RUN "
                "--dataset PATH, with --resume where discovery has begun."
            )
        return name, _modified(name)

    @property
    def _recorded(self) -> Dataset:
        """The demonstrations as they are, with the spaces that came with them; UserError without any."""
        return _load(*self._source)

    @cached_property
    def _split(self) -> ValidationSplit:
        return _split_of(*self._source, self.config.validation_share)

    @property
    def _facts(self) -> EnvironmentFacts | None:
        """What the environment says of itself; None if the run has none."""
        env, kwargs = self.config.env, self.config.env_kwargs
        return None if env is None else environment_facts(env, kwargs)

    def acting_where_recorded(self) -> OfflineConfig:
        """This config with the environment of the data: its ID, keywords and time limit.

        UserError if they name none, or one of which Gymnasium and the installed packages know nothing: no module is
        imported because data name it.
        """
        data = self._recorded
        env = None if data.env is None else _known(data.env)
        if env is None:
            raise UserError(f"the data do not tell an environment that is known here; write --env {_asking(data)}.")
        options = keywords(data.env_kwargs)
        if data.env_steps not in (None, environment_facts(env, data.env_kwargs).max_steps):
            options["max_episode_steps"] = data.env_steps
        return replace(self.config, env=env, env_kwargs=json.dumps(options) if options else None)

    def spec(self) -> DomainSpec:
        encoder, action = encoder_options(self.dataset.observation_space), action_options(self.dataset.action_space)
        scales = self._split.scales
        encoder, action = encoder | scales.get("states", {}), action | scales.get("actions", {})
        return DomainSpec(encoder, action, self._limit(), window=self.config.window)

    def versions(self) -> dict[str, str]:
        """The record of the environment in which the run acts, or else of the data."""
        facts = self._facts
        return self.data_versions() if facts is None else facts.versions

    def data_versions(self) -> dict[str, str]:
        """The record of where the data were made, with their digest; of the environment, if they do not say."""
        known, facts = self._recorded.record, self._facts
        acting = {} if ENVIRONMENT in known or facts is None else facts.versions
        return {**record(None), **acting, **known}

    def demonstrations(self, split: Split, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes of the split, drawn with replacement; for validation of those that are trained on if there are no
        others. Subgoals are left out: their names are not known."""
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        rng, validation = np.random.default_rng(int(seed)), self._split.validation
        rows = validation if split == "validation" and len(validation) else self._split.training
        episodes = self.dataset.read(rows[rng.integers(len(rows), size=n)], longest=self.config.window, rng=rng)
        unlabelled = Trajectories(states=episodes.states, actions=episodes.actions, lengths=episodes.lengths)
        return unlabelled.to(generator.device)

    def validates(self, phase: Split) -> bool:
        """Both phases, unless no episode is for validation."""
        return bool(len(self._split.validation))

    def reset(
        self, n: int, generator: torch.Generator, *, task: Any = None, max_steps: int | None = None
    ) -> GymnasiumBatch:
        """n episodes of the environment, which has one task; UserError without an environment, and for another task."""
        self.check_acting()
        if task is not None:
            raise UserError(f"the environment {self.config.env} has one task, not {task!r}; leave the task out.")
        return self._environments.reset(n, generator, max_steps or self._limit())

    def check_acting(self) -> None:
        if self.config.env is None:
            data = self.dataset
            recorded = data.env is not None and data.env_kwargs is not None and _known(data.env) is not None
            raise UserError(
                "acting needs an environment and the run has a dataset only; give it one by: metacontroller pretrain "
                f"RUN --resume --env {'data' if recorded else _asking(data)}."
            )

    @cached_property
    def _environments(self) -> GymnasiumEnvironments:
        assert self.config.env is not None
        options = {"success_return": self.config.success_return, "workers": self.config.workers}
        return GymnasiumEnvironments(self.config.env, kwargs=self.config.env_kwargs, **options)

    def _limit(self) -> int:
        """The time limit of episodes."""
        facts = self._facts
        return self.config.max_steps or (facts and facts.max_steps) or self.dataset.longest


def _modified(name: str | None) -> int:
    """When a folder was last written; 0 for other datasets."""
    header = Path(name or "") / "store.json"
    return header.stat().st_mtime_ns if header.is_file() else 0


@lru_cache(maxsize=4)
def _load(name: str, modified: int) -> Dataset:
    return load_dataset(name)


@lru_cache(maxsize=4)
def _split_of(name: str, modified: int, share: float) -> ValidationSplit:
    split = ValidationSplit(_load(name, modified), share)
    if share and not len(split.validation):
        print(
            f"dataset {name}: none of its {len(split.training)} episodes can be held out for validation, because there "
            "is one only, or each occurs again and again; held-out figures are of episodes that were trained on.",
            file=sys.stderr,
            flush=True,
        )
    return split


def _known(env: str) -> str | None:
    """The ID of data's environment, if Gymnasium or an installed package knows it without the module that it names."""
    try:
        return environment_id(env.rpartition(":")[2])
    except UserError:
        return None


def _asking(data: Dataset) -> str:
    """What stands behind --env to ask for the environment of data."""
    if data.env is None:
        return "ID, a Gymnasium ID"
    more = f" --env-kwargs {shlex.quote(data.env_kwargs)}" if data.env_kwargs not in (None, "{}") else ""
    return shlex.quote(data.env) + more


def _warn_of_another_world(data: Dataset, config: OfflineConfig, facts: EnvironmentFacts) -> None:
    """Warns if the environment of a run is made otherwise than that of its data, as far as that is known."""
    pairs = {"the keywords": (data.env_kwargs, facts.kwargs), "the time limit": (data.env_steps, facts.max_steps)}
    told = [f"{what} {was} and not {now}" for what, (was, now) in pairs.items() if was is not None and was != now]
    if told:
        warnings.warn(
            f"dataset {config.dataset} was recorded in {data.env} with {', '.join(told)}, as {config.env} has here: it "
            "may be another world; --env data acts in that of the data.",
            stacklevel=3,
        )


def _fitted(dataset: Dataset, env: str | None, facts: EnvironmentFacts) -> Dataset:
    """The data with the environment's spaces, whose bounds may differ; UserError if they do not fit.

    Spaces that did not come with the data may have seen too few choices.
    """
    pairs = {
        "observations": (encoder_options(dataset.observation_space), encoder_options(facts.observation_space)),
        "actions": (action_options(dataset.action_space), action_options(facts.action_space)),
    }
    for what, (data, world) in pairs.items():
        if data != world and (dataset.stated or not _within(data, world)):
            raise UserError(
                f"the data have {what} {data} but env {env!r} has {world}; name the environment they are from."
            )
    return replace(dataset, observation_space=facts.observation_space, action_space=facts.action_space)


def _within(data: dict[str, Any], world: dict[str, Any]) -> bool:
    """Whether both are as many choices, none of which has more values in the data."""
    if data.keys() != {"num_discrete"} or world.keys() != {"num_discrete"}:
        return False
    fewer, more = (np.atleast_1d(options["num_discrete"]) for options in (data, world))
    return len(fewer) == len(more) and bool((fewer <= more).all())
