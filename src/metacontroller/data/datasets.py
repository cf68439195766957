"""Datasets by name: episodes with the spaces of their observations and actions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from metacontroller.data.minari import (
    minari_episodes,
    minari_spaces,
    minari_versions,
    open_minari,
    refusing_damage,
    write_minari,
)
from metacontroller.data.spaces import action_shape, encoder_options, model_dtype, space_from_json, space_to_json
from metacontroller.data.store import HEADER, Episodes, TrajectoryStore
from metacontroller.data.trajectories import Trajectories, checked_episodes
from metacontroller.errors import UserError
from metacontroller.ranges import shown
from metacontroller.storage.user_function import code_of_the_user, import_user_function
from metacontroller.storage.versions import DATA, ENVIRONMENT


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
        seen, taken = encoder_options(self.observation_space).get("image", (-1,)), action_shape(self.action_space)
        return replace(
            episodes,
            states=states.reshape(*states.shape[:2], *seen),
            actions=actions.reshape(*actions.shape[:2], *taken),
        )

    def meta(self) -> dict[str, Any]:
        """What a store keeps beside the episodes, for `dataset_of_store`."""
        made = {"env_kwargs": self.env_kwargs, "env_steps": self.env_steps, "versions": dict(self.versions)}
        return {**space_meta(self.observation_space, self.action_space, self.env), **made}

    def write(self, path: str | Path) -> TrajectoryStore:
        """As a folder, which `load_dataset` reads."""
        return TrajectoryStore.join(path, [self.episodes], self.meta())

    def write_minari(self, dataset_id: str, **options: Any) -> Any:
        """As a Minari dataset, see `data.minari.write_minari`."""
        rows = (self.episodes.read(np.array([row])) for row in range(len(self.episodes)))
        unpadded = (next(row.episodes()) for row in rows)
        return write_minari(dataset_id, unpadded, self.observation_space, self.action_space, **options)


def space_meta(observation_space: spaces.Space, action_space: spaces.Space, env: str | None) -> dict[str, Any]:
    """The spaces as JSON, for the meta of a store."""
    return {
        "observation_space": space_to_json(observation_space),
        "action_space": space_to_json(action_space),
        "env": env,
    }


def spec_kwargs(spec: Any) -> str | None:
    """The keywords with which an environment of a `gymnasium.envs.registration.EnvSpec` is made, as JSON; None where
    they are not known, or are no JSON. How it is shown does not belong to them."""
    with suppress(AttributeError, TypeError, ValueError):
        return json.dumps({name: spec.kwargs[name] for name in sorted(spec.kwargs) if name != "render_mode"})
    return None


def load_dataset(name: str) -> Dataset:
    """A dataset by its ID: a folder of ours, a function as package.module:function, or a dataset of Minari's.

    The function takes no arguments and returns a `Dataset`, or `Trajectories`, whose spaces are then read from the
    data. UserError if there is no such dataset, for values that are not finite, and for a folder of which a file was
    changed: all of it is read once.
    """
    if Path(name).is_dir():
        dataset = dataset_of_store(TrajectoryStore(name).verify())
    elif ":" in name:
        dataset = _of_function(name)
    else:
        return read_minari(name)
    try:
        dataset.episodes.refuse_not_finite()
    except UserError as error:
        raise UserError(f"dataset {name!r}: {error}") from error
    return dataset


def _of_function(name: str) -> Dataset:
    make = import_user_function("dataset", name)
    with code_of_the_user("dataset", name):
        made = make()
    if isinstance(made, Dataset):
        _refuse_misfits(made.observation_space, made.action_space, made.episodes)
        return made
    if isinstance(made, Trajectories):
        return dataset_of(Episodes.of(made), {})
    raise UserError(f"dataset {name!r} returned a {type(made).__name__}; expected a Dataset or Trajectories.")


def read_minari(name: Any) -> Dataset:
    """A `minari.MinariDataset`, or the local one with that ID. UserError if it holds no steps, episodes that are not
    sound (`checked_episodes`), or files that cannot be read; a number that was changed in them is not found: Minari
    keeps no checksums."""
    columns: dict[str, list[np.ndarray]] = {}
    with refusing_damage(name):
        dataset = open_minari(name)
        for episode in checked_episodes(minari_episodes(dataset)):
            for field, value in {**episode, "lengths": len(episode["actions"])}.items():
                columns.setdefault(field, []).append(np.atleast_1d(np.asarray(value)))
        if not columns:
            raise UserError(f"the Minari dataset {dataset.spec.dataset_id} holds no steps; choose another.")
        arrays = {field: np.concatenate(values) for field, values in columns.items()}
        spec = dataset.spec.env_spec
        made = {} if spec is None else {"env_kwargs": spec_kwargs(spec), "env_steps": spec.max_episode_steps}
        return Dataset(Episodes(arrays), *minari_spaces(dataset), versions=minari_versions(dataset), **made)


def dataset_of_store(store: TrajectoryStore) -> Dataset:
    """A folder's episodes with the spaces in its header, or with those that the data show."""
    try:
        return dataset_of(store, store.meta)
    except UserError as error:
        raise UserError(f"{store.path / HEADER}: {error}") from error


def dataset_of(episodes: Episodes, meta: Mapping[str, Any]) -> Dataset:
    """Episodes with the spaces that ``meta`` holds, or that the data show."""
    if "observation_space" in meta:
        observation_space, action_space = (space_from_json(meta.get(name)) for name in _FITTED)
        _refuse_misfits(observation_space, action_space, episodes)
        env = meta.get("env")
        if not isinstance(env, str | None):
            raise UserError(f"env of the dataset is {shown(env)}; expected the ID of an environment, or none.")
        kwargs, steps = meta.get("env_kwargs"), meta.get("env_steps")
        if not isinstance(kwargs, str | None) or not isinstance(steps, int | None):
            raise UserError(f"the environment of the dataset was made with {shown(kwargs)} and {shown(steps)} steps.")
        versions = meta.get("versions", {})
        if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
            raise UserError(f"versions of the dataset are {shown(versions)}; expected texts by name.")
        made = {"env_kwargs": kwargs, "env_steps": steps, "versions": versions}
        return Dataset(episodes, observation_space, action_space, env, **made)
    observed, taken = (_shown(name, episodes.arrays[name]) for name in ("states", "actions"))
    return Dataset(episodes, observed, taken, stated=False)


_FITTED = {"observation_space": "states", "action_space": "actions"}
"""Names in a store's meta, and the arrays that hold values of these spaces."""


def _refuse_misfits(observation_space: spaces.Space, action_space: spaces.Space, episodes: Episodes) -> None:
    """UserError unless states and actions are of these spaces."""
    for name, space in zip(_FITTED, (observation_space, action_space), strict=True):
        _refuse_misfit(name, space, episodes.arrays[_FITTED[name]])


def _refuse_misfit(name: str, space: spaces.Space, array: np.ndarray) -> None:
    """UserError unless a step of the array has as many entries as a value of the space has for a model, whole numbers
    from 0 below that of its values where they are choices."""
    options = encoder_options(space)
    count = options.get("num_continuous") or math.prod(options.get("image") or [len(options.get("num_discrete", ()))])
    if math.prod(array.shape[1:]) != count:
        raise UserError(
            f"{name} of the dataset is {shown(space)}, {count} numbers a step, and its {_FITTED[name]} have "
            f"{math.prod(array.shape[1:])}; write the dataset again."
        )
    if "num_discrete" in options:
        rows = array.reshape(len(array), -1)
        low, high = rows.min(0), rows.max(0)
        whole = array.dtype.kind in "biu" or not (rows % 1).any()
        if not whole or (low < 0).any() or (high >= options["num_discrete"]).any():
            raise UserError(
                f"{name} of the dataset is {shown(space)}, and its {_FITTED[name]} lie in {low.min()}..{high.max()}; "
                f"expected whole numbers in 0..{max(options['num_discrete']) - 1}, counted from 0."
            )


def _shown(name: str, array: np.ndarray) -> spaces.Space:
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
