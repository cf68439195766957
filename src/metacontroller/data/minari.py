"""Minari datasets, read and written (the extra ``data``). Both ways are lossless for observations, actions, rewards
and endings; infos, options and seeds of episodes are not kept, nor are parts of observations that hold text.

An episode is a mapping as `Trajectories.from_episodes` takes it: states (t + 1, ...), actions (t, ...) and rewards (t,)
as in `data.spaces`, terminated and truncated, a bool each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces

from metacontroller.data.spaces import (
    action_options,
    decode_actions,
    decode_observations,
    encode_actions,
    encode_observations,
    readable,
    without_text,
)
from metacontroller.errors import UserError
from metacontroller.ranges import shown
from metacontroller.storage.files import check_regular, read_json


def open_minari(dataset: Any) -> Any:
    """The local `minari.MinariDataset` of that ID; a dataset that is one already is returned as it is.

    UserError if there is none of that ID on this machine.
    """
    if not isinstance(dataset, str):
        return dataset
    minari = _minari(f"dataset {dataset!r} is no folder and no package.module:function; as the ID of Minari's it needs")
    path = minari.storage.get_dataset_path(dataset)
    for file in path.glob("data/*"):
        if not file.is_dir():
            check_regular(file)  # a pipe would be waited for
        if file.suffix == ".json":
            read_json(file, infinite=True)  # Minari reads one of any size
    if not (path / "data").is_dir():
        raise UserError(
            f"dataset {dataset!r} is no folder, no package.module:function and no Minari dataset on this machine "
            f"(there: {_local(minari)}); `minari download ID` brings one."
        )
    return minari.load_dataset(dataset)


def _local(minari: Any) -> str:
    """The IDs on this machine; Minari lists none of them if one folder has a name that it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of folders that hold none
            return ", ".join(minari.list_local_datasets()) or "none"
    except ValueError as error:
        return f"not known, {shown(error)}"


@contextmanager
def refusing_damage(dataset: Any) -> Iterator[None]:
    """Context in which a dataset is opened and read: UserError, with its name, for files that cannot be read."""
    try:
        yield
    except (UserError, MemoryError, PermissionError):
        raise
    except Exception as error:  # of Minari, h5py or numpy, whatever they make of a damaged file
        raise UserError(
            f"the Minari dataset {shown(dataset)} cannot be read ({shown(error)}); download or write it again."
        ) from error


def minari_spaces(dataset: Any) -> tuple[spaces.Space, spaces.Space, str | None]:
    """Spaces of observations, as far as a model can read them, and of actions; the Gymnasium ID of the environment."""
    spec = dataset.spec.env_spec
    return readable(dataset.observation_space), dataset.action_space, None if spec is None else spec.id


def minari_versions(dataset: Any) -> dict[str, str]:
    """The versions of packages that a dataset was made with, where it says so exactly: ``name==version``."""
    needs = dataset.storage.metadata.get("requirements", [])
    return {
        name.strip(): version.strip() for name, same, version in (str(need).partition("==") for need in needs) if same
    }


def minari_episodes(dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The episodes of a `minari.MinariDataset` that have at least one step, each with its number there, for
    `checked_episodes`: Minari itself does not compare their lengths. UserError for spaces that no model reads."""
    readable_space = readable(dataset.observation_space)
    action_options(dataset.action_space)
    for episode in dataset.iterate_episodes():
        if len(episode):
            try:
                yield int(episode.id), _row(dataset, readable_space, episode)
            except (ValueError, IndexError, KeyError, TypeError) as error:
                raise UserError(
                    f"episode {episode.id} of the Minari dataset {dataset.spec.dataset_id} does not fit its spaces "
                    f"({shown(error)}); leave it out, as by dataset.filter_episodes, or mend it."
                ) from error


def _row(dataset: Any, readable_space: spaces.Space, episode: Any) -> dict[str, Any]:
    observations = without_text(dataset.observation_space, episode.observations)
    return {
        "states": encode_observations(readable_space, observations),
        "actions": encode_actions(dataset.action_space, episode.actions),
        "rewards": np.asarray(episode.rewards),
        "terminated": bool(episode.terminations[-1]),
        "truncated": bool(episode.truncations[-1]),
    }


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
        buffers.append(
            EpisodeBuffer(
                observations=decode_observations(observation_space, np.asarray(episode["states"])),
                actions=decode_actions(action_space, np.asarray(episode["actions"])),  # type: ignore[arg-type]
                rewards=np.asarray(episode["rewards"]),  # type: ignore[arg-type]
                terminations=last & bool(episode.get("terminated")),  # type: ignore[arg-type]
                truncations=last & bool(episode.get("truncated")),  # type: ignore[arg-type]
                infos={},
            )
        )
    options = {"jpeg_encoding": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of authors and environments that are not given
        return minari.create_dataset_from_buffers(
            dataset_id, buffers, observation_space=observation_space, action_space=action_space, **options
        )


def _minari(need: str) -> Any:
    """The package; need: what for, as the beginning of a sentence."""
    try:
        import minari
    except ImportError as error:
        raise UserError(f"{need} minari, which is not installed: pip install 'metacontroller-rl[data]'.") from error
    return minari
