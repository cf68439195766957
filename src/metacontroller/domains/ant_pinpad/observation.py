"""What the ant observes, as numbers (§4), and what of the world can be read back from them.

    symlog of proprioception  27  torso height, orientation (quaternion), 8 joint angles; velocity of the torso in the
                                  world's frame, angular velocity in its own, and those of the 8 joints
    place                      2  x, y, scaled so that the plane is -1..1
    relative positions     2 (o)  from the ant to the middle of each object's cell, in the same unit
    local coordinates          2  of the ant in its cell, scaled so that the cell is -1..1

Joint angles follow the order of MuJoCo's model. Contact forces, which some versions of MuJoCo's ant observe, are left
out, and relative positions are in units of half the plane (our choices; the paper is silent).

Axes: b row, o object (every color, then every wall). A state (..., 29) float64 is MuJoCo's qpos (15), then qvel (14).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metacontroller.domains.ant_pinpad.layouts import Arena

NUM_POSITIONS, NUM_VELOCITIES, NUM_ACTIONS = 15, 14, 8
STATE_SIZE = NUM_POSITIONS + NUM_VELOCITIES
PROPRIOCEPTION = STATE_SIZE - 2
"""Numbers of the state without x and y."""
ORIENTATION = slice(1, 5)
"""The quaternion (w, x, y, z) in the proprioception."""
VELOCITY = slice(13, 15)
"""x and y of the torso's velocity in the proprioception."""


class Parts(NamedTuple):
    """An observation taken apart: proprioception (..., 27) without symlog, place (..., 2), relative (..., o, 2) and
    local (..., 2), these three in the observation's units."""

    proprioception: Tensor
    place: Tensor
    relative: Tensor
    local: Tensor


def observation_size(arena: Arena) -> int:
    """Numbers of an observation."""
    return PROPRIOCEPTION + 2 + 2 * arena.num_objects + 2


def symlog(values: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return values.sign() * values.abs().log1p()


def symexp(values: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return values.sign() * values.abs().expm1()


def observe(arena: Arena, state: Tensor, cell: Tensor, objects: Tensor) -> Tensor:
    """state (b, 29), cell (b,) of the ant, objects (b, o) cells -> (b, observation_size) float32."""
    place = state[:, :2]
    relative = (arena.center(objects) - place[:, None]) / arena.half
    local = (place - arena.center(cell)) / (arena.cell_size / 2)
    parts = [symlog(state[:, 2:]), place / arena.half, relative.flatten(1), local]
    return torch.cat(parts, 1).float()


def parts_of(arena: Arena, observation: Tensor) -> Parts:
    """Takes observations (..., observation_size) apart."""
    sizes = [PROPRIOCEPTION, 2, 2 * arena.num_objects, 2]
    inner, place, relative, local = observation.split(sizes, -1)
    return Parts(symexp(inner), place, relative.unflatten(-1, (-1, 2)), local)


def state_of(arena: Arena, observation: Tensor) -> Tensor:
    """The states (..., 29) float64 of observations, as exactly as those tell."""
    parts = parts_of(arena, observation.double())
    return torch.cat([parts.place * arena.half, parts.proprioception], -1)


def objects_of(arena: Arena, observation: Tensor) -> Tensor:
    """The cells of all objects in observations, int64 (..., o)."""
    parts = parts_of(arena, observation.double())
    return arena.cell((parts.place[..., None, :] + parts.relative) * arena.half)


def heading(orientation: Tensor) -> Tensor:
    """cos and sin of the yaw of quaternions (..., 4): (..., 2)."""
    w, x, y, z = orientation.unbind(-1)
    ahead = torch.stack([1 - 2 * (y * y + z * z), 2 * (w * z + x * y)], -1)
    return ahead / ahead.norm(dim=-1, keepdim=True).clamp_min(1e-9)
