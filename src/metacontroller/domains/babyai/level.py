"""The room as a minigrid level: objects to be picked up one after the other, in BabyAI's own instruction classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from minigrid.core.roomgrid import RoomGrid
from minigrid.core.world_object import WorldObj
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.envs.babyai.core.verifier import ActionInstr, BeforeInstr, Instr, ObjDesc, PickupInstr


class ThenInstr(BeforeInstr):
    """First an instruction, then the rest, which may be a `ThenInstr` too; the mission reads "a, then b".

    BabyAI's `BeforeInstr` holds two instructions at most. It also judges the second one by the step that completed the
    first, which a strict instruction takes for a failure; here each step is judged once.
    """

    def __init__(self, first: Instr, rest: Instr) -> None:
        self.instr_a, self.instr_b, self.strict = first, rest, False

    def verify(self, action: int) -> str:
        if self.a_done == "success":
            return self.instr_b.verify(action)
        self.a_done = self.instr_a.verify(action)
        return "failure" if self.a_done == "failure" else "continue"


class FreeInstr(ActionInstr):
    """Asks for nothing: the episode ends at the time limit."""

    def surface(self, env: Any) -> str:
        return ""

    def verify_action(self, action: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return "continue"


def sequence(objects: Sequence[tuple[str, str]], task: Sequence[int]) -> Instr:
    """The instruction to pick up the objects of a task in order; picking up another one fails."""
    parts: list[Instr] = [PickupInstr(ObjDesc(*objects[index]), strict=True) for index in task]
    return reduce(lambda rest, first: ThenInstr(first, rest), reversed(parts)) if parts else FreeInstr()


class Room(RoomGridLevel):
    """One room with the given objects and a task; where objects and agent are is random, see ``reset(seed=...)``.

    Steps return no observation, because minigrid computes it cell by cell; `observation.view_symbols` computes those of
    many rooms at once. Gymnasium's own is `RoomGridLevel.gen_obs(room)`.
    """

    def __init__(self, objects: Sequence[tuple[str, str]], task: Sequence[int], *, size: int, max_steps: int) -> None:
        """objects: (kind, color) of each. task: their indices in the order asked for, () for none."""
        self.kinds, self.task = objects, task
        self.objects: list[WorldObj] = []
        super().__init__(num_rows=1, num_cols=1, room_size=size, max_steps=max_steps)

    def gen_mission(self) -> None:
        while True:
            self.place_agent()
            self.objects = [self.add_object(0, 0, *kind)[0] for kind in self.kinds]
            if self.check_objs_reachable(raise_exc=False):
                break
            RoomGrid._gen_grid(self, self.width, self.height)  # an empty room again
        self.instrs = sequence(self.kinds, self.task)

    def gen_obs(self) -> dict[str, Any]:
        return {}

    @property
    def carried(self) -> int:
        """Index of the object that the agent carries, -1 for none."""
        return next((index for index, thing in enumerate(self.objects) if thing is self.carrying), -1)
