"""The expert: a policy that PPO trained, which is told the way (§4). Here it is loaded and acts; it is trained by
`examples/ant_expert.py`.

It is told in which direction the shortest way to the next color goes. Our choice: it sees the world turned by right
angles, so that its way always goes to the right, and its legs counted from the one that is then ahead to the left
(`symmetry`). So it learns one walk, not one for each direction and leg. Of the plane it sees the cells around its own.

Axes: b row, c color, n cell, k cell around the ant's, f feature.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.ant_pinpad.layouts import DOWN, LEFT, RIGHT, STEPS, UP, direction_fields
from metacontroller.domains.ant_pinpad.observation import NUM_ACTIONS, PROPRIOCEPTION, heading, symexp, symlog
from metacontroller.domains.ant_pinpad.simulator import AntBatch
from metacontroller.domains.ant_pinpad.symmetry import LEGS, turn_body, turn_torques, turn_world, turned
from metacontroller.domains.pinpad.episodes import record
from metacontroller.errors import UserError
from metacontroller.storage.tensor_file import read_tensors, write_tensors

HIDDEN = (256, 256)
"""Units of the hidden layers."""
FORMAT = 1
_HEADER = "ant-expert"
LIMIT = 10.0
"""Of normalized features."""
TURNS_TO_RIGHT = {RIGHT: 0, DOWN: 1, LEFT: 2, UP: 3}
"""Right angles, counter-clockwise, after which each direction goes to the right."""
AROUND = tuple((x, y) for y in (1, 0, -1) for x in (-1, 0, 1) if (x, y) != (0, 0))
"""The cells around the ant's own, (right, up)."""
AHEAD = AROUND.index((1, 0))
FEATURES = PROPRIOCEPTION + 2 + len(AROUND) + 2
"""f."""


class Guide:
    """What the expert is told in a batch of episodes, which must keep its rows; `renew` tells of new layouts."""

    def __init__(self, env: AntBatch) -> None:
        self.env = env
        self.fields = direction_fields(env.arena, env.objects)
        device = self.fields.device  # the last of both: no way
        self.vectors = torch.tensor([[right, -down] for down, right in STEPS] + [[0, 0]], device=device).double()
        self.turns = torch.tensor([*(TURNS_TO_RIGHT[way] for way in range(len(STEPS))), 0], device=device)

    def renew(self, rows: Tensor) -> None:
        """Looks at the layouts of ``rows`` (m,) again, whose episodes were replaced."""
        self.fields[rows] = direction_fields(self.env.arena, self.env.objects[rows])

    def way(self) -> Tensor:
        """(b, 2) float64: the direction to go in the ant's own cell, a unit vector, or zero."""
        return self.vectors[self.direction(self.env.cell)]

    def direction(self, cells: Tensor) -> Tensor:
        """(b,) cells -> (b,) int64: the direction to go in each, -1 where there is none, as where no color is asked
        for."""
        goal = self.env.goal()
        rows = torch.arange(len(goal), device=goal.device)
        return self.fields[rows, goal.clamp(min=0), cells].masked_fill(goal < 0, -1)

    def frame(self) -> tuple[Tensor, Tensor]:
        """(b,) int64 each: by how many right angles the world is turned so that the way goes to the right, and then the
        ant's own frame so that it looks to the right, within half a right angle."""
        world = self.turns[self.direction(self.env.cell)]
        cos, sin = turned(heading(self.env.state[:, 3:7]), world[:, None]).unbind(-1)
        return world, -torch.round(torch.atan2(sin, cos) / (math.pi / 2)).long() % LEGS

    def features(self) -> Tensor:
        """(b, f) float32: what the expert observes. Proprioception and place in the ant's cell, which of the cells
        around it may not be entered, and the way from the cell ahead, a unit vector; all as `frame` has it."""
        env, arena = self.env, self.env.arena
        world, body = self.frame()
        shown = turn_world(arena, env.observation[:, None].double(), world).squeeze(1)
        inner = symlog(turn_body(symexp(shown[:, :PROPRIOCEPTION]), body))
        around = turned(shown.new_tensor(AROUND).expand(len(world), -1, -1), -world[:, None, None] % LEGS)
        cells = arena.cell(arena.center(env.cell)[:, None] + arena.cell_size * around)  # (b, k)
        objects, ahead = env.objects_at(cells), cells[:, AHEAD]
        closed = (cells < 0) | (objects >= arena.num_colors) | ((objects >= 0) & (objects != env.goal()[:, None]))
        way = self.direction(ahead.clamp(min=0)).masked_fill(ahead < 0, -1)
        then = turned(self.vectors[way], world[:, None])
        return torch.cat([inner, shown[:, -2:], closed, then], 1).float()

    def torques(self, actions: Tensor) -> Tensor:
        """(b, 8): the expert's actions, legs counted as in `features`, as torques of the ant."""
        _, body = self.frame()
        return turn_torques(actions, -body % LEGS)


class Expert(nn.Module):
    """A Gaussian policy: normalized features, hidden layers with tanh, mean torques; one deviation for each torque.

    mean, std (f,): of the features. log_std (8,).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, hidden: Sequence[int] = HIDDEN) -> None:
        super().__init__()
        self.features, self.hidden = features, tuple(hidden)
        sizes = [features, *self.hidden]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(sizes[-1], NUM_ACTIONS)
        self.log_std = nn.Parameter(torch.zeros(NUM_ACTIONS))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    @classmethod
    def untrained(cls) -> Expert:
        """New weights, always the same: for tests, and for presets that take seconds."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(FEATURES, (16,))

    def forward(self, features: Tensor) -> Tensor:
        """features (b, f) -> mean torques (b, 8), not yet within -1..1."""
        normalized = ((features - self.mean) / self.std).clamp(-LIMIT, LIMIT)
        return self.head(self.body(normalized))

    @torch.no_grad()
    def act(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Torques (b, 8) within -1..1: the mean ones, or with a generator samples."""
        torques = self(features)
        if generator is not None:
            noise = torch.randn(torques.shape, generator=generator, device=torques.device)
            torques = torques + self.log_std.exp() * noise
        return torques.clamp(-1.0, 1.0)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Writes weights and ``about``, JSON values such as versions and success, to one file."""
        header = {"format": FORMAT, "hidden": self.hidden, "features": self.features, "about": about}
        header["sha256"] = self._seal(header)
        write_tensors(path, self.state_dict(), header, key=_HEADER)

    @classmethod
    def load(cls, path: Path) -> tuple[Expert, dict[str, Any]]:
        """The expert that ``save`` wrote, and ``about``; no code is run from the file. UserError for another file, and
        for one that was changed."""
        if not path.is_file():
            raise UserError(f"there is no expert in {path}; train one with examples/ant_expert.py, or name its file.")
        tensors, header = read_tensors(path, key=_HEADER)
        if header.get("format") != FORMAT:
            raise UserError(f"{path} holds no expert of format {FORMAT}; name one that examples/ant_expert.py wrote.")
        try:
            expert = cls._of(tensors, **header)
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError):
            raise UserError(
                f"{path} is not what was written (other weights, shapes or SHA-256); write it again."
            ) from None
        return expert, header["about"]

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], *, features: int, hidden: list[int], **rest: Any) -> Expert:
        """The expert that a file holds; an error of any kind unless its header says what the weights are."""
        with torch.device("meta"):  # the shapes alone: the weights are those of the file
            expert = cls(features, hidden[: len(tensors)])
        expert.load_state_dict(tensors, assign=True)
        seal = expert._seal({"features": features, "hidden": hidden, **rest})
        sound = all(value.dtype == torch.float32 for value in tensors.values())
        if not sound or not isinstance(rest["about"], dict) or rest.get("sha256", seal) != seal:
            raise UserError(seal)
        return expert

    def _seal(self, header: dict[str, Any]) -> str:
        """SHA-256 of the weights and of what a header says of them."""
        content = {name: value for name, value in header.items() if name != "sha256"}
        return hashlib.sha256(f"{self.fingerprint()} {json.dumps(content, sort_keys=True)}".encode()).hexdigest()

    def fingerprint(self) -> str:
        """The same for equal weights alone."""
        content = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            content.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return content.hexdigest()


def play(env: AntBatch, expert: Expert, generator: torch.Generator | None) -> Trajectories:
    """Plays every episode to its end, see `record`; with a generator actions are samples, without it mean ones.

    UserError if the expert observes other features.
    """
    if expert.features != FEATURES:
        raise UserError(f"the expert observes {expert.features} numbers; expected {FEATURES}. Train one anew.")
    guide = Guide(env)
    return record(env, lambda: guide.torques(expert.act(guide.features(), generator)))
