"""Rooms that step together: minigrid moves each of them, the observations of all are computed at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from metacontroller.domains.babyai.level import Room
from metacontroller.domains.babyai.observation import (
    EMPTY,
    HEADINGS,
    image_symbols,
    mission_words,
    object_symbol,
    view_symbols,
    with_pictures,
)

LEFT, RIGHT, FORWARD, PICKUP, DROP = range(5)
"""The actions, numbered as minigrid's; its other two, toggle and done, have no use here and are left out."""
NUM_ACTIONS = 5
PUBLIC = ("terminated", "truncated", "success", "steps", "subgoals_done")
"""Attributes that are tensors, each a copy of an array of that name with an underscore."""
ROW_ARRAYS = (
    *(f"_{name}" for name in PUBLIC),
    *("_reached", "_tasks", "_mission", "_cells", "_carried", "_place", "_direction"),
)


class RoomBatch:
    """b rooms: the `BatchedEnv` of this world. All its tensors are on one device; minigrid works on the CPU.

    Rewards, endings and success are minigrid's: 1 - 0.9 steps / max_steps when the last object of the task is picked
    up, 0 and the end for picking up any other object than the next. A subgoal is an object; it is reached when it is
    picked up.
    """

    observation: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    steps: Tensor
    subgoals_done: Tensor

    def __init__(
        self,
        rooms: Sequence[Room],
        *,
        mission_length: int,
        show_mission: bool | Sequence[bool] = False,
        tiles: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """rooms: after their reset. mission_length: words in an observation, all 0 unless ``show_mission``, for all
        rooms or for each. tiles: those of which pictures are made in place of symbols, as of `engine.tiles`."""
        self.rooms, self.tiles, self.device = list(rooms), tiles, device
        count, longest = len(self.rooms), max(len(room.task) for room in self.rooms)
        self._tasks = np.array([[*room.task, *[-1] * (longest + 1 - len(room.task))] for room in self.rooms])
        shown = [show_mission] * count if isinstance(show_mission, bool) else show_mission
        pairs = zip(self.rooms, shown, strict=True)
        self._mission = np.stack([mission_words(room.mission if show else "", mission_length) for room, show in pairs])
        self._cells = np.stack([image_symbols(room.grid.encode()) for room in self.rooms])
        self._symbols = np.array([*(object_symbol(*kind) for kind in self.rooms[0].kinds), EMPTY])  # -1: nothing
        self._place = np.array([room.agent_pos for room in self.rooms])
        self._direction = np.array([room.agent_dir for room in self.rooms])
        self._carried, self._reached = np.full(count, -1), np.full(count, -1)
        self._terminated, self._truncated, self._success = (np.zeros(count, dtype=bool) for _ in range(3))
        self._steps, self._subgoals_done = (np.zeros(count, dtype=np.int64) for _ in range(2))
        self._publish(self._observe())

    def __len__(self) -> int:
        return len(self.rooms)

    def step(self, actions: Tensor) -> Tensor:
        rewards = np.zeros(len(self.rooms), dtype=np.float32)
        self._reached[:] = -1
        taken = actions.tolist()
        for row in np.flatnonzero(~(self._terminated | self._truncated)).tolist():
            action, room = taken[row], self.rooms[row]
            _, reward, ended, truncated, _ = room.step(action)
            self._terminated[row], self._truncated[row] = ended, truncated and not ended
            self._steps[row] += 1
            if action in (PICKUP, DROP):
                self._handle(row, room)
            elif action == FORWARD:
                self._place[row] = room.agent_pos
            else:
                self._direction[row] = room.agent_dir
            if ended:
                rewards[row], self._success[row] = reward, reward > 0
        self._publish(self._observe())
        return torch.from_numpy(rewards).to(self.device)

    def _handle(self, row: int, room: Room) -> None:
        """Notes what an attempt to pick up or drop changed: the cell in front, and what the agent carries."""
        before, after = self._carried[row], room.carried
        if before == after:
            return
        x, y = self._place[row] + HEADINGS[self._direction[row]]
        self._cells[row, x, y] = EMPTY if after >= 0 else self._symbols[before]
        self._carried[row] = after
        if after >= 0:
            self._reached[row] = after
            self._subgoals_done[row] += after == self._tasks[row, self._subgoals_done[row]]

    def _observe(self) -> Tensor:
        view = view_symbols(self._cells, self._place, self._direction, self._symbols[self._carried])
        observation = np.concatenate([view, self._direction[:, None], self._mission], 1)
        if self.tiles is not None:
            observation = with_pictures(observation, self.tiles)
        return torch.from_numpy(observation).to(self.device)

    def _publish(self, observation: Tensor) -> None:
        """Sets what others read; what they have read stays as it was at that step."""
        self.observation = observation
        for name in PUBLIC:
            setattr(self, name, self._tensor(getattr(self, f"_{name}")))

    def select(self, rows: Tensor) -> None:
        index = rows.cpu().numpy()
        self.rooms = [self.rooms[row] for row in index.tolist()]
        for name in ROW_ARRAYS:
            setattr(self, name, getattr(self, name)[index])
        self._publish(self._observe())

    def replace(self, rows: Tensor, other: RoomBatch) -> None:
        """Puts the rooms of another batch, whose tasks are as long, in the place of ``rows``, int64 (m,)."""
        index = rows.cpu().numpy()
        self.rooms = list(self.rooms)
        for row, room in zip(index.tolist(), other.rooms, strict=True):
            self.rooms[row] = room
        for name in ROW_ARRAYS:
            values = getattr(self, name).copy()
            values[index] = getattr(other, name)
            setattr(self, name, values)
        self._publish(self.observation.index_copy(0, rows, other.observation))

    def goal(self) -> Tensor:
        return self._tensor(np.take_along_axis(self._tasks, self._subgoals_done[:, None], 1)[:, 0])

    def reached(self) -> Tensor:
        return self._tensor(self._reached)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.copy()).to(self.device)
