"""What quarter turns do: of the whole world, and of the ant's own frame.

The plane has no preferred direction, and the ant's four legs are alike. So a world turned by right angles is a world
again, and an ant whose legs are counted from another one is an ant again: it moves as before where its torques are
counted likewise. An expert that always sees the way ahead of it, and of its legs the same ones in front, has sixteen
times less to learn.

Legs are numbered counter-clockwise, the first one ahead to the left. Axes: b row.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from metacontroller.domains.ant_pinpad.layouts import Arena
from metacontroller.domains.ant_pinpad.observation import ORIENTATION, PROPRIOCEPTION, VELOCITY, parts_of, symlog

LEGS = 4
ANKLE_SIGNS = (1.0, -1.0, -1.0, 1.0)
"""Of each leg's ankle in MuJoCo's model: with it, a positive angle bends every leg alike."""
ANGLES, ANGULAR_VELOCITY, RATES = slice(5, 13), slice(16, 19), slice(19, 27)
"""Joint angles, the torso's angular velocity in its own frame and the joints' in the proprioception: hip and ankle of
the first leg, then of the second."""


def turned(vectors: Tensor, quarter: Tensor) -> Tensor:
    """Vectors (..., 2) turned by so many right angles, int64 (..., 1) that broadcasts."""
    x, y = vectors[..., :1], vectors[..., 1:]
    turns = [torch.cat(pair, -1) for pair in ((x, y), (-y, x), (-x, -y), (y, -x))]
    return torch.stack(turns).gather(0, quarter.expand(vectors.shape)[None])[0]


def turn_world(arena: Arena, states: Tensor, quarter: Tensor) -> Tensor:
    """Turns the world of each row around the middle of the plane by ``quarter`` (b,) right angles, counter-clockwise.

    states (b, t, observation_size) -> the same shape. The ant's own joints and angular velocity stay as they are.
    """
    parts = parts_of(arena, states)
    quarter = quarter[:, None, None]
    inner = parts.proprioception.clone()
    inner[..., ORIENTATION] = _times(_around_z(quarter[..., 0], states.dtype), inner[..., ORIENTATION])
    inner[..., VELOCITY] = turned(inner[..., VELOCITY], quarter)
    relative = turned(parts.relative, quarter[..., None])
    vectors = [turned(parts.place, quarter), relative.flatten(-2), turned(parts.local, quarter)]
    return torch.cat([symlog(inner), *vectors], -1)


def turn_around(states: Tensor, quarter: Tensor) -> Tensor:
    """The worlds turned by ``quarter`` (b,) right angles, counter-clockwise, with the legs renamed so that the yaw
    stays what it was: where that is limited at the start, it would tell how far the world was turned.

    states (b, t, observation_size) -> the same shape. Numbers change places and signs, and no more: it is exact.
    Torques turn along by `turn_torques` with ``-quarter % LEGS``.
    """
    orders, signs = _quarter_turns(states.shape[-1])
    order, sign = (torch.tensor(table, device=states.device)[quarter][:, None] for table in (orders, signs))
    return states.gather(-1, order.expand_as(states)) * sign.to(states.dtype)


@cache
def _quarter_turns(size: int) -> tuple[list[list[int]], list[list[int]]]:
    """For 0 to 3 right angles, of which number of an observation each number of the turned one is a copy, and its
    sign."""
    order, signs = list(range(size)), [1] * size
    vectors = [ORIENTATION.start + 1, VELOCITY.start, ANGULAR_VELOCITY.start, *range(PROPRIOCEPTION, size, 2)]
    for x in vectors:  # (x, y) -> (-y, x)
        order[x], order[x + 1], signs[x] = x + 1, x, -1
    for part in (ANGLES, RATES):  # each leg is the one before
        for leg in range(LEGS):
            to, source = part.start + 2 * leg, part.start + 2 * ((leg - 1) % LEGS)
            order[to], order[to + 1] = source, source + 1
            signs[to + 1] = int(ANKLE_SIGNS[leg] * ANKLE_SIGNS[leg - 1])
    orders, all_signs = [list(range(size))], [[1] * size]
    for _ in range(3):
        all_signs.append([sign * all_signs[-1][source] for sign, source in zip(signs, order, strict=True)])
        orders.append([orders[-1][source] for source in order])
    return orders, all_signs


def shift_colors(arena: Arena, states: Tensor, shift: Tensor) -> Tensor:
    """The same worlds with each color counted on by ``shift`` (b,), modulo their number. states (b, t,
    observation_size) -> the same shape."""
    colors = torch.arange(arena.num_colors, device=states.device)
    sizes = [PROPRIOCEPTION + 2, 2 * arena.num_colors, 2 * arena.num_walls + 2]
    before, seen, after = states.split(sizes, -1)
    source = ((colors - shift[:, None]) % arena.num_colors)[:, None, :, None].expand(*states.shape[:2], -1, 2)
    shown = seen.unflatten(-1, (-1, 2)).gather(2, source)
    return torch.cat([before, shown.flatten(-2), after], -1)


def turn_body(proprioception: Tensor, quarter: Tensor) -> Tensor:
    """The same ant in a frame that is turned by ``quarter`` (b,) right angles, counter-clockwise, with its legs counted
    from there. proprioception (b, 27) without symlog -> the same shape."""
    inner = proprioception.clone()
    inner[:, ORIENTATION] = _times(inner[:, ORIENTATION], _around_z(quarter, inner.dtype))
    spin = inner[:, ANGULAR_VELOCITY]
    inner[:, ANGULAR_VELOCITY] = torch.cat([turned(spin[:, :2], (-quarter % LEGS)[:, None]), spin[:, 2:]], 1)
    for part in (ANGLES, RATES):
        inner[:, part] = turn_legs(inner[:, part], quarter)
    return inner


def turn_legs(joints: Tensor, quarter: Tensor) -> Tensor:
    """Values of hips and ankles (b, 8), legs in order, with the legs counted from another one."""
    signs = joints.new_tensor(ANKLE_SIGNS)
    hips, ankles = joints.unflatten(1, (LEGS, 2)).unbind(-1)
    order = (torch.arange(LEGS, device=joints.device) + quarter[:, None]) % LEGS
    return torch.stack([hips.gather(1, order), (ankles * signs).gather(1, order) * signs], -1).flatten(1)


def turn_torques(torques: Tensor, quarter: Tensor) -> Tensor:
    """Torques (b, 8), which begin with the last leg's, likewise."""
    return turn_legs(torques.roll(-2, 1), quarter).roll(2, 1)


def _around_z(quarter: Tensor, dtype: torch.dtype) -> Tensor:
    """The quaternions (..., 4) of turns by so many right angles."""
    half = quarter.double() * (math.pi / 4)
    zero = torch.zeros_like(half)
    return torch.stack([half.cos(), zero, zero, half.sin()], -1).to(dtype)


def _times(first: Tensor, second: Tensor) -> Tensor:
    """Products of quaternions (..., 4)."""
    a, b, c, d = first.unbind(-1)
    w, x, y, z = second.unbind(-1)
    product = [a * w - b * x - c * y - d * z, a * x + b * w + c * z - d * y]
    product += [a * y - b * z + c * w + d * x, a * z + b * y - c * x + d * w]
    return torch.stack(product, -1)
