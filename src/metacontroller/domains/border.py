"""The border to every environment and to every policy of the user's: what passes it is of the right kind, or refused.

`collect`, acting, evaluation and `InternalEnv` call these functions. What an environment returns is compared with its
own spaces and cast to their types where that loses nothing, floats to the precision of the space; the same holds for
actions. `Misfit` says what is wrong; what it costs, an episode or the command, is the caller's.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from metacontroller.data.spaces import parts_of, put_together, without_text
from metacontroller.ranges import shown


class Misfit(ValueError):
    """What does not belong to its space, as the end of a sentence."""


def began(env: gymnasium.Env, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The first observation and the info of a new episode."""
    returned = env.reset(**options)
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], dict):
        raise Misfit(f"reset returned {shown(returned)}; expected an observation and an info")
    return returned


def stepped(env: gymnasium.Env, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """One step: the observation as the environment gave it, reward, terminated, truncated and the info."""
    returned: Any = env.step(action)
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise Misfit(f"step returned {shown(returned)}; expected observation, reward, terminated, truncated and info")
    observation, reward, terminated, truncated, info = returned
    if not isinstance(info, dict):
        raise Misfit(f"the info is {shown(info)}; expected a dict")
    return observation, one_number(reward), bool(terminated), bool(truncated), info


def one_number(reward: Any) -> float:
    """A reward, a finite number or an array or list of one."""
    given = _array(reward)
    if given is None or given.size != 1 or not np.isfinite(given).all():
        raise Misfit(f"the reward is {shown(reward)}; expected one finite number")
    return float(given.item())


def observed(space: spaces.Space, readable_space: spaces.Space, observation: Any) -> Any:
    """An observation of ``space`` without text: one of ``readable_space``, which is ``readable(space)``."""
    try:
        numbers = without_text(space, observation)
    except (TypeError, ValueError, LookupError) as error:
        raise Misfit(f"the observation is {shown(observation)}; expected one of {shown(space)}") from error
    return fitted(readable_space, numbers, "the observation")


def fitted(space: spaces.Space, value: Any, what: str) -> Any:
    """A value of a readable space, or an action, in the type of the space; Misfit, which begins with ``what``, unless
    it is one."""
    if parts := parts_of(space):
        return put_together(space, {key: fitted(part, value[key], f"{what}[{key!r}]") for key, part in parts})
    given = _array(value)
    if given is None:
        raise Misfit(f"{what} is {shown(value)}; expected one of {shown(space)}")
    if isinstance(space, spaces.Discrete) and given.size == 1:
        given = given.reshape(())
    if given.shape != space.shape:
        raise Misfit(f"{what} has the shape {given.shape}; expected {space.shape}, one of {shown(space)}")
    finite, floats = np.isfinite(given), given.dtype.kind == np.dtype(space.dtype).kind == "f"
    with np.errstate(over="ignore", invalid="ignore"):  # what grows infinite is found below
        cast = np.where(finite, given, 0).astype(space.dtype)
    right = finite & _within(space, cast) & (floats | (cast == given))
    if not right.all():
        first = np.unravel_index(int(np.argmin(right)), given.shape)
        place = f" at {[int(index) for index in first]}" if first else ""
        raise Misfit(f"{what} is {given[first].item()}{place}; expected one of {shown(space)}")
    return cast[()]


def _array(value: Any) -> np.ndarray | None:
    """Numbers as an array; None for all else."""
    try:
        given = np.asarray(value)
    except (TypeError, ValueError):  # lists of different lengths
        return None
    return given if given.dtype.kind in "biuf" else None


def _within(space: spaces.Space, values: np.ndarray) -> Any:
    """Which of the values, of the space's shape and type, are finite and within its bounds."""
    if isinstance(space, spaces.Box):
        return np.isfinite(values) & (values >= space.low) & (values <= space.high)
    if isinstance(space, spaces.MultiBinary):
        return (values == 0) | (values == 1)
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    count = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return (values >= space.start) & (values < space.start + count)
