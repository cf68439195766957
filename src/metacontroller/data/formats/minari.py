"""Minari datasets, read and written (the extra ``data``). Both ways are lossless for observations, actions, rewards
and endings; infos, options and seeds of episodes are not kept, nor are parts of observations that hold text.

A number that was changed in its files is not found: Minari keeps no checksums.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from metacontroller.data.formats import Source
from metacontroller.data.spaces import (
    action_options,
    decode_actions,
    decode_observations,
    encode_actions,
    encode_observations,
    readable,
    spec_kwargs,
    without_text,
)
from metacontroller.errors import UserError
from metacontroller.ranges import shown
from metacontroller.storage.files import check_regular, read_json


def matches(name: str) -> bool:
    """Whatever is no folder and no name of a function may be the ID of a dataset."""
    return ":" not in name and not Path(name).is_dir()


def read(dataset: Any) -> Source:
    """A `minari.MinariDataset`, or the local one with that ID.

    UserError if there is none of that ID on this machine, for spaces that no model reads, and, when the episodes are
    asked for, for files that cannot be read and if there are no steps.
    """
    with _refusing_damage(dataset):
        opened = _open(dataset) if isinstance(dataset, str) else dataset
        action_options(opened.action_space)
        spec, needs = opened.spec.env_spec, opened.storage.metadata.get("requirements", [])
        exact = (str(need).partition("==") for need in needs)
        return Source(
            _episodes(dataset, opened),
            readable(opened.observation_space),
            opened.action_space,
            env=None if spec is None else spec.id,
            env_kwargs=None if spec is None else spec_kwargs(spec),
            env_steps=None if spec is None else spec.max_episode_steps,
            versions={name.strip(): version.strip() for name, same, version in exact if same},
        )


def _episodes(name: Any, dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The episodes that have at least one step, each with its number there."""
    seen, empty, episodes = readable(dataset.observation_space), True, dataset.iterate_episodes()
    with _refusing_damage(name):
        for episode in (episode for episode in episodes if len(episode)):
            try:
                observations = without_text(dataset.observation_space, episode.observations)
                row = {
                    "states": encode_observations(seen, observations),
                    "actions": encode_actions(dataset.action_space, episode.actions),
                    "rewards": np.asarray(episode.rewards),
                    "terminated": bool(episode.terminations[-1]),
                    "truncated": bool(episode.truncations[-1]),
                }
            except (ValueError, IndexError, KeyError, TypeError) as error:
                raise UserError(
                    f"episode {episode.id} of the Minari dataset {dataset.spec.dataset_id} does not fit its spaces "
                    f"({shown(error)}); leave it out, as by dataset.filter_episodes, or mend it."
                ) from error
            empty = False
            yield int(episode.id), row
        if empty:
            raise UserError(f"the Minari dataset {dataset.spec.dataset_id} holds no steps; choose another.")


def _open(name: str) -> Any:
    """The local dataset of that ID."""
    minari = _minari(f"dataset {name!r} is no folder and no package.module:function; as the ID of Minari's it needs")
    path = minari.storage.get_dataset_path(name)
    for file in path.glob("data/*"):
        if not file.is_dir():
            check_regular(file)  # a pipe would be waited for
        if file.suffix == ".json":
            read_json(file, infinite=True)  # Minari reads one of any size
    if not (path / "data").is_dir():
        raise UserError(
            f"dataset {name!r} is no folder, no package.module:function and no Minari dataset on this machine "
            f"(there: {_local(minari)}); `minari download ID` brings one."
        )
    return minari.load_dataset(name)


def _local(minari: Any) -> str:
    """The IDs on this machine; Minari lists none of them if one folder has a name that it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of folders that hold none
            return ", ".join(minari.list_local_datasets()) or "none"
    except ValueError as error:
        return f"not known, {shown(error)}"


@contextmanager
def _refusing_damage(dataset: Any) -> Iterator[None]:
    """Context in which a dataset is opened or read: UserError, with its name, for files that cannot be read."""
    try:
        yield
    except (UserError, MemoryError, PermissionError):
        raise
    except Exception as error:  # of Minari, h5py or numpy, whatever they make of a damaged file
        raise UserError(
            f"the Minari dataset {shown(dataset)} cannot be read ({shown(error)}); download or write it again."
        ) from error


def write_minari(
    dataset_id: str,
    episodes: Iterable[Mapping[str, Any]],
    observation_space: spaces.Space,
    action_space: spaces.Space,
    **options: Any,
) -> Any:
    """Writes a Minari dataset, from buffers, and returns the `minari.MinariDataset`.

    options: further ones of `minari.create_dataset_from_buffers`, such as env and author. Images are stored without
    loss. UserError for episodes without rewards.
    """
    minari = _minari("writing a Minari dataset needs")
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for episode in episodes:
        if episode.get("rewards") is None:
            raise UserError("the episodes have no rewards, which a Minari dataset needs; give them, zeros if need be.")
        last = np.arange(len(episode["actions"])) == len(episode["actions"]) - 1
        arrays: dict[str, Any] = {
            "observations": decode_observations(observation_space, np.asarray(episode["states"])),
            "actions": decode_actions(action_space, np.asarray(episode["actions"])),
            "rewards": np.asarray(episode["rewards"]),
            "terminations": last & bool(episode.get("terminated")),
            "truncations": last & bool(episode.get("truncated")),
        }
        buffers.append(EpisodeBuffer(**arrays, infos={}))
    options = {"jpeg_encoding": False, "observation_space": observation_space, "action_space": action_space, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of authors and environments that are not given
        return minari.create_dataset_from_buffers(dataset_id, buffers, **options)


def _minari(need: str) -> Any:
    """The package; need: what for, as the beginning of a sentence."""
    try:
        import minari
    except ImportError as error:
        raise UserError(f"{need} minari, which is not installed: pip install 'metacontroller-rl[data]'.") from error
    return minari
