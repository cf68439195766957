"""Gymnasium's spaces as arrays that a model reads, and back.

Axes: t steps (or rows), k choices, d entries of a vector. An observation becomes one of three:

    Discrete, MultiDiscrete, MultiBinary   (t, k) int64, choices counted from 0
    Box of uint8 with two or three axes    (t, *shape) uint8, an image
    other Box, Dict, Tuple                 (t, d), as Gymnasium's own flatten

and an action (t,) or (t, k) int64, or (t, d) of a Box. Parts of a Dict or Tuple that hold text are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from gymnasium import spaces

from metacontroller.errors import UserError
from metacontroller.ranges import shown

MOST_ENTRIES = 2**24
"""Of a space that a file describes."""

MIN_IMAGE_SIDE = 8
"""Of a uint8 Box with two axes, below which it is a vector."""

CHOICES = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def parts_of(space: spaces.Space) -> list[tuple[Any, spaces.Space]]:
    """The parts of a Dict by name and of a Tuple by index, as their values are taken apart; none of other spaces."""
    if isinstance(space, spaces.Dict):
        return list(space.items())
    return list(enumerate(space)) if isinstance(space, spaces.Tuple) else []


def put_together(space: spaces.Space, parts: Mapping[Any, Any]) -> Any:
    """A value of a Dict or Tuple from those of its parts."""
    return dict(parts) if isinstance(space, spaces.Dict) else tuple(parts.values())


def readable(space: spaces.Space) -> spaces.Space:
    """The space without the parts that hold text; UserError if a model can read none or not all of the rest."""
    kept = _without_text(space)
    if kept is None:
        raise UserError(f"the observation space {space} holds nothing but text; choose an environment with numbers.")
    return kept


def without_text(space: spaces.Space, value: Any) -> Any:
    """One value, or several side by side, of ``space`` as one of ``readable(space)``."""
    parts = parts_of(space)
    if not parts:
        return value
    if isinstance(space, spaces.Tuple) and len(value) != len(parts):
        raise UserError(f"{len(value)} parts instead of {len(parts)}")
    kept = {key: without_text(part, value[key]) for key, part in parts if _without_text(part) is not None}
    return put_together(space, kept)


def stack(space: spaces.Space, values: Sequence[Any]) -> Any:
    """Values of a readable space side by side, as `encode_observations` takes them."""
    parts = parts_of(space)
    if not parts:
        return np.stack([np.asarray(value) for value in values])
    return put_together(space, {key: stack(part, [value[key] for value in values]) for key, part in parts})


def encoder_options(space: spaces.Space) -> dict[str, Any]:
    """Options of the state encoder for a readable space, without statistics of normalisation."""
    if isinstance(space, CHOICES):
        return {"num_discrete": choices(space)}
    if is_image(space):
        assert space.shape is not None
        return {"image": list(space.shape)}
    return {"num_continuous": spaces.flatdim(space)}


def action_options(space: spaces.Space) -> dict[str, Any]:
    """Options of the action readout; UserError for other spaces than Discrete, MultiDiscrete, MultiBinary and Box."""
    if isinstance(space, spaces.Discrete):
        return {"num_discrete": int(space.n)}
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        return {"num_discrete": choices(space)}
    if isinstance(space, spaces.Box):
        return {"num_continuous": spaces.flatdim(space)}
    raise UserError(f"the action space is {space}; expected Discrete, MultiDiscrete, MultiBinary or Box.")


def action_shape(space: spaces.Space) -> tuple[int, ...]:
    """Shape of one action as a model reads it: (), (k,) or (d,), of which -1 stands for the number."""
    return () if isinstance(space, spaces.Discrete) else (-1,)


def model_dtype(space: spaces.Space) -> type[np.generic]:
    """The type in which a model reads observations of a readable space."""
    if is_image(space):
        return np.uint8
    return np.int64 if isinstance(space, CHOICES) else np.float32


def model_shape(space: spaces.Space) -> tuple[int, ...]:
    """Shape of one observation of a readable space as a model reads it."""
    options = encoder_options(space)
    return tuple(options.get("image") or [options.get("num_continuous") or len(options.get("num_discrete", ()))])


def choices(space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary) -> list[int]:
    """Number of values of each choice, k in all."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.flatten().tolist()
    return [2] * spaces.flatdim(space)


def is_image(space: spaces.Space) -> bool:
    """Whether a space holds images: uint8 with three axes, or with two long ones."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 3 or (len(space.shape) == 2 and min(space.shape) >= MIN_IMAGE_SIDE)


def channel_axis(shape: Sequence[int]) -> int | None:
    """Which axis of an image holds the channels, the shorter one of the first and the last; None with two axes."""
    return None if len(shape) == 2 else 0 if shape[0] < shape[2] else 2


# -- values -----------------------------------------------------------------------------------------------------------


def encode_observations(space: spaces.Space, values: Any) -> np.ndarray:
    """Values of a readable space, t side by side, as one array; for Dict and Tuple a structure of such values."""
    if is_image(space):
        return np.asarray(values)
    if isinstance(space, CHOICES):
        return _indices(space, values).reshape(len(values), -1)
    return _flatten(space, values)


def decode_observations(space: spaces.Space, array: np.ndarray) -> Any:
    """The inverse of `encode_observations`."""
    if is_image(space):
        return array
    if isinstance(space, CHOICES):
        return _values(space, array)
    if isinstance(space, spaces.Box):
        return array.reshape(len(array), *space.shape)
    return _unflatten(space, array)


def encode_actions(space: spaces.Space, values: Any) -> np.ndarray:
    """t values of an action space side by side, as the model's actions."""
    if isinstance(space, spaces.Box):
        return np.asarray(values).reshape(len(values), -1)
    indices = _indices(space, values)
    return indices if isinstance(space, spaces.Discrete) else indices.reshape(len(values), -1)


def decode_actions(space: spaces.Space, array: np.ndarray) -> np.ndarray:
    """The inverse of `encode_actions`."""
    return array.reshape(len(array), *space.shape) if isinstance(space, spaces.Box) else _values(space, array)


def environment_actions(space: spaces.Space, values: np.ndarray) -> np.ndarray:
    """The actions that n actions of a model stand for: as `decode_actions`, those of a Box within its bounds, and the
    nearest whole numbers where it holds such."""
    decoded = decode_actions(space, values)
    if not isinstance(space, spaces.Box):
        return decoded
    within = np.clip(decoded, space.low, space.high)
    return (np.rint(within) if np.issubdtype(space.dtype, np.integer) else within).astype(space.dtype)


def environment_states(space: spaces.Space, values: Sequence[Any]) -> np.ndarray:
    """n values of a readable space, one beside the other, as a model reads them."""
    return encode_observations(space, stack(space, values)).astype(model_dtype(space))


def _indices(space: Any, values: Any) -> np.ndarray:
    """Choices counted from 0, int64."""
    return np.asarray(values).astype(np.int64) - getattr(space, "start", 0)


def _values(space: Any, indices: np.ndarray) -> np.ndarray:
    return (indices.reshape(len(indices), *space.shape) + getattr(space, "start", 0)).astype(space.dtype)


def _flatten(space: spaces.Space, values: Any) -> np.ndarray:
    """`gymnasium.spaces.flatten` of t values at once; a Box keeps the type of its data."""
    if parts := parts_of(space):
        return np.concatenate([_flatten(part, values[key]) for key, part in parts], 1)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        indices = _indices(space, values).reshape(len(values), -1)
        blocks = [np.eye(n, dtype=space.dtype)[indices[:, i]] for i, n in enumerate(choices(space))]
        return np.concatenate(blocks, 1)
    return np.asarray(values).reshape(len(values), -1)


def _unflatten(space: spaces.Space, array: np.ndarray) -> Any:
    if parts := parts_of(space):
        ends = np.cumsum([spaces.flatdim(part) for _, part in parts])[:-1]
        blocks = np.split(array, ends, 1)
        pairs = zip(parts, blocks, strict=True)
        return put_together(space, {key: _unflatten(part, block) for (key, part), block in pairs})
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        blocks = np.split(array, np.cumsum(choices(space))[:-1], 1)
        return _values(space, np.stack([block.argmax(1) for block in blocks], 1))
    return array.reshape(len(array), *(space.shape or ())).astype(space.dtype)


def _without_text(space: spaces.Space) -> spaces.Space | None:
    """The space without text, and without spaces of other packages, which hold text as a rule; None where nothing is
    left. UserError for spaces of Gymnasium's that a model cannot read."""
    if parts := parts_of(space):
        kept = {key: left for key, part in parts if (left := _without_text(part)) is not None}
        made = spaces.Dict(kept) if isinstance(space, spaces.Dict) else spaces.Tuple(list(kept.values()))
        return made if kept else None
    if isinstance(space, spaces.Text) or not type(space).__module__.startswith("gymnasium."):
        return None
    if not isinstance(space, (spaces.Box, *CHOICES)):
        raise UserError(
            f"the observation space holds {space}; expected Box, Discrete, MultiDiscrete, MultiBinary, or Dict and "
            "Tuple of those; wrap the environment or convert the data."
        )
    return space


# -- JSON -------------------------------------------------------------------------------------------------------------


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """A readable space as JSON, for `space_from_json`."""
    kind = type(space).__name__
    if parts := parts_of(space):
        written = put_together(space, {key: space_to_json(part) for key, part in parts})
        return {"type": kind, "spaces": written if isinstance(space, spaces.Dict) else list(written)}
    if isinstance(space, spaces.Box):
        low, high = (_short(bound) for bound in (space.low, space.high))
        return {"type": kind, "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"type": kind, "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        nvec, start = space.nvec.tolist(), space.start.tolist()
        return {"type": kind, "nvec": nvec, "start": start, "dtype": str(space.dtype)}
    assert isinstance(space, spaces.MultiBinary)
    return {"type": kind, "n": list(space.shape)}


def space_from_json(data: Any) -> spaces.Space:
    """The space that `space_to_json` wrote; UserError for anything else."""
    try:
        return _space(data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"a space is {shown(data)} ({shown(error)}); expected one as this version writes it.") from None


def _space(data: dict[str, Any]) -> spaces.Space:
    kind, options = data.get("type"), {name: value for name, value in data.items() if name != "type"}
    if kind == "Dict":
        return spaces.Dict({key: _space(part) for key, part in options["spaces"].items()})
    if kind == "Tuple":
        return spaces.Tuple([_space(part) for part in options["spaces"]])
    if kind == "Box":
        shape, dtype = _bounded(options["shape"]), np.dtype(options["dtype"])
        low, high = (np.broadcast_to(np.array(options[name], dtype), shape) for name in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(**options)
    if kind == "MultiDiscrete":
        nvec, start, dtype = np.array(options["nvec"]), np.array(options["start"]), np.dtype(options["dtype"])
        return spaces.MultiDiscrete(nvec, dtype.type, start=start)
    if kind == "MultiBinary":
        shape = _bounded(options["n"])
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    raise UserError(f"a space has the type {kind!r}; expected one that this version writes; write the data anew.")


def _bounded(shape: list[int]) -> list[int]:
    """The shape; UserError for one that no observation has, before memory is taken for it."""
    if min(shape, default=1) < 0 or math.prod(shape) > MOST_ENTRIES:
        raise UserError(f"a space has the shape {shown(shape)}; expected at most {MOST_ENTRIES} entries.")
    return shape


def spec_kwargs(spec: Any) -> str | None:
    """The keywords with which an environment of a `gymnasium.envs.registration.EnvSpec` is made, as JSON; None where
    they are not known, or are no JSON. How it is shown does not belong to them."""
    with suppress(AttributeError, TypeError, ValueError):
        return json.dumps({name: spec.kwargs[name] for name in sorted(spec.kwargs) if name != "render_mode"})
    return None


def _short(bound: np.ndarray) -> Any:
    """One number where all are alike."""
    return bound.flat[0].item() if bound.size and (bound == bound.flat[0]).all() else bound.tolist()
