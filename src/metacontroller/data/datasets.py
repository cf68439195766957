"""Datasets by name: episodes with the spaces of their observations and actions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from metacontroller.data.formats import minari
from metacontroller.data.spaces import (
    action_shape,
    encoder_options,
    model_dtype,
    model_shape,
    space_from_json,
    space_to_json,
)
from metacontroller.data.store import HEADER, TrajectoryStore
from metacontroller.data.trajectories import Episodes, Trajectories
from metacontroller.errors import UserError
from metacontroller.ranges import check, require, shown
from metacontroller.storage.user_function import code_of_the_user, import_user_function
from metacontroller.storage.versions import DATA, ENVIRONMENT

FORMATS = (minari,)
"""Modules of `data.formats`; the first that matches a name reads the dataset."""
_ARRAY_OF = {"observation_space": "states", "action_space": "actions"}
"""The array that holds values of a space."""


@dataclass(frozen=True)
class Dataset:
    """Episodes as a model reads them (`data.spaces`), and the spaces that they came from.

    env: the Gymnasium ID of the environment where they were recorded, if that is known; env_kwargs: the keywords with
    which it was made (`spec_kwargs`); env_steps: its time limit. stated: whether the spaces came with the episodes;
    else they are the smallest ones that hold them. versions: the record of where they were made, as far as that is
    known, see `storage.versions`.
    """

    episodes: Episodes
    observation_space: spaces.Space
    action_space: spaces.Space
    env: str | None = None
    stated: bool = True
    env_kwargs: str | None = None
    env_steps: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def record(self) -> dict[str, str]:
        """``versions``, with the environment if it is known, and the digest of the episodes."""
        named = {} if self.env is None else {ENVIRONMENT: self.env.rpartition(":")[2]}
        return {**named, **self.versions, DATA: self.episodes.digest()}

    @property
    def longest(self) -> int:
        """Steps of the longest episode."""
        return int(self.episodes.lengths.max())

    def read(self, rows: np.ndarray, **options: Any) -> Trajectories:
        """Episodes as of `Episodes.read`, with states and actions of the types and shapes that models read."""
        episodes = self.episodes.read(rows, **options)
        types = {np.uint8: torch.uint8, np.int64: torch.int64, np.float32: torch.float32}
        states = episodes.states.to(types[model_dtype(self.observation_space)])  # type: ignore[index]
        actions = episodes.actions.to(torch.float32 if isinstance(self.action_space, spaces.Box) else torch.int64)
        states = states.reshape(*states.shape[:2], *model_shape(self.observation_space))
        actions = actions.reshape(*actions.shape[:2], *action_shape(self.action_space))
        return replace(episodes, states=states, actions=actions)

    def meta(self) -> dict[str, Any]:
        """What a store keeps beside the episodes, for `dataset_of_store`."""
        made = {"env_kwargs": self.env_kwargs, "env_steps": self.env_steps, "versions": dict(self.versions)}
        return {**space_meta(self.observation_space, self.action_space, self.env), **made}

    def write(self, path: str | Path) -> TrajectoryStore:
        """As a folder, which `load_dataset` reads."""
        return TrajectoryStore.join(path, [self.episodes], self.meta())

    def write_minari(self, dataset_id: str, **options: Any) -> Any:
        """As a Minari dataset, see `data.formats.minari.write_minari`."""
        return minari.write_minari(dataset_id, self.episodes, self.observation_space, self.action_space, **options)


def space_meta(observation_space: spaces.Space, action_space: spaces.Space, env: str | None) -> dict[str, Any]:
    """The spaces as JSON, for the meta of a store."""
    observed, taken = space_to_json(observation_space), space_to_json(action_space)
    return {"observation_space": observed, "action_space": taken, "env": env}


def load_dataset(name: str) -> Dataset:
    """A dataset by its ID: a folder of ours, a function as package.module:function, or one of `FORMATS`.

    The function takes no arguments and returns a `Dataset`, or `Trajectories`, whose spaces are then read from the
    data. UserError if there is no such dataset, for values that are not finite, and for a folder of which a file was
    changed: all of it is read once.
    """
    form = next((form for form in FORMATS if form.matches(name)), None)
    if form is not None:
        source = form.read(name)
        return Dataset(**{**source._asdict(), "episodes": Episodes.of_rows(source.episodes)})
    dataset = dataset_of_store(TrajectoryStore(name).verify()) if Path(name).is_dir() else _of_function(name)
    try:
        dataset.episodes.refuse_not_finite()
    except UserError as error:
        raise UserError(f"dataset {name!r}: {error}") from error
    return dataset


def _of_function(name: str) -> Dataset:
    make = import_user_function("dataset", name)
    with code_of_the_user("dataset", name):
        made = make()
    if isinstance(made, Trajectories):
        return dataset_of(Episodes.of(made), {})
    if not isinstance(made, Dataset):
        raise UserError(f"dataset {name!r} returned a {type(made).__name__}; expected a Dataset or Trajectories.")
    return _fitting(made)


def dataset_of_store(store: TrajectoryStore) -> Dataset:
    """A folder's episodes with the spaces in its header, or with those that the data show."""
    try:
        return dataset_of(store, store.meta)
    except UserError as error:
        raise UserError(f"{store.path / HEADER}: {error}") from error


def dataset_of(episodes: Episodes, meta: Mapping[str, Any]) -> Dataset:
    """Episodes with the spaces that ``meta`` holds, or that the data show."""
    if "observation_space" not in meta:
        observed, taken = (_smallest_space(name, episodes.arrays[name]) for name in ("states", "actions"))
        return Dataset(episodes, observed, taken, stated=False)
    observed, taken = (space_from_json(meta.get(name)) for name in _ARRAY_OF)
    made: dict[str, Any] = {name: meta.get(name) for name in ("env", "env_kwargs", "env_steps")}
    for name, value in made.items():
        check(f"{name} of the dataset", value, int | None if name == "env_steps" else str | None)
    versions = meta.get("versions", {})
    named = isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values())
    require(named, "versions of the dataset", versions, "texts by name")
    return _fitting(Dataset(episodes, observed, taken, **made, versions=versions))


def _fitting(dataset: Dataset) -> Dataset:
    """The dataset; UserError unless a step has as many entries as a value of its space has for a model, whole numbers
    from 0 below that of its values where they are choices."""
    for name, field_name in _ARRAY_OF.items():
        space, array = getattr(dataset, name), dataset.episodes.arrays[field_name]
        options, size = encoder_options(space), math.prod(array.shape[1:])
        choices, count = options.get("num_discrete", ()), math.prod(model_shape(space))
        if size != count:
            raise UserError(
                f"{name} of the dataset is {shown(space)}, {count} numbers a step, and its {field_name} have {size}; "
                "write the dataset again."
            )
        if choices:
            rows = array.reshape(len(array), -1)
            low, high = rows.min(0), rows.max(0)
            fraction = array.dtype.kind == "f" and (rows % 1).any()
            if fraction or (low < 0).any() or (high >= choices).any():
                raise UserError(
                    f"{name} of the dataset is {shown(space)}, and its {field_name} lie in {low.min()}..{high.max()}; "
                    f"expected whole numbers in 0..{max(choices) - 1}, counted from 0."
                )
    return dataset


def _smallest_space(name: str, array: np.ndarray) -> spaces.Space:
    """The smallest space that holds an array's rows: of whole numbers from 0, of images, or of any numbers.

    Whole numbers in vectors of more than one entry are choices in actions, and numbers in states.
    """
    if array.dtype == np.uint8 and array.ndim > 2:
        return spaces.Box(0, 255, array.shape[1:], np.uint8)
    whole = np.issubdtype(array.dtype, np.integer)
    if whole and array.min() >= 0 and (name == "actions" or array.ndim == 1 or array.shape[1] == 1):
        most = np.maximum(np.asarray(array).reshape(len(array), -1).max(0), 1) + 1
        return spaces.Discrete(int(most[0])) if len(most) == 1 else spaces.MultiDiscrete(most)
    dtype = array.dtype if np.issubdtype(array.dtype, np.floating) else np.dtype(np.float32)
    return spaces.Box(-np.inf, np.inf, array.shape[1:] or (1,), dtype.type)
