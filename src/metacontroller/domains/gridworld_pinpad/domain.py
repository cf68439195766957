"""gridworld-pinpad as a world: its config, its experts, its episodes (arXiv 2512.20605, §4, tables A1 and A2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from metacontroller.data.batching import apart
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import DomainSpec, Split
from metacontroller.domains.gridworld_pinpad.expert import TieBreak, expert_trajectories
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, random_symmetry
from metacontroller.domains.gridworld_pinpad.rendering import render_rgb
from metacontroller.domains.gridworld_pinpad.simulator import NUM_ACTIONS, PinpadBatch, start_grids
from metacontroller.domains.pinpad.layouts import Layouts
from metacontroller.domains.pinpad.tasks import A1_POST, TABLE_A1, Task, check_tasks, format_task, subgoal_vocabulary
from metacontroller.domains.pinpad.worlds import TaskWorld
from metacontroller.ranges import MOST_SIDE, Probability, Whole, Width, check

View = Literal["absolute", "egocentric"]


@dataclass(frozen=True, kw_only=True)
class GridworldPinpadConfig(PinpadConfig):
    """A grid, its tasks, experts and observations; the defaults are the paper's (§4, table A1).

    UserError for values out of range and for impossible tasks.
    """

    tasks: tuple[Task, ...] = TABLE_A1
    """Tasks of the demonstrations, each as colors in order, such as 0-1-2."""
    post_task: Task = A1_POST
    """The post-training task, which reinforcement learning must solve."""
    colors_per_subgoal: Width = 2
    """Consecutive colors of a task that form one subgoal, the unit of labels and metrics."""
    tie_break: TieBreak = "random"
    """How experts choose among equally short paths: at random (the paper), or always in the same order."""
    epsilon: Probability = 0.0
    """Share of the experts' moves that are random, in demonstrations for pretraining."""
    discovery_epsilon: Probability = 0.0
    """The same in demonstrations for discovery."""
    view: View = "absolute"
    """What a model observes: the cell of each object (the paper), or its displacement from the agent."""
    reach: Annotated[int, Whole(most=MOST_SIDE)] | None = None
    """Cells beyond which an egocentric view shows only the direction; none: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tasks(self.tasks, self.num_colors)
        check_tasks([self.post_task], self.num_colors)
        _ = self.subgoals  # raises for tasks that are not made of whole subgoals

    @property
    def grid(self) -> PinpadConfig:
        """Size and content of the grid alone."""
        return PinpadConfig(**{part.name: getattr(self, part.name) for part in fields(PinpadConfig)})

    @property
    def subgoals(self) -> tuple[Task, ...]:
        """The subgoals of all tasks, each as its colors; labels are indices of this tuple."""
        return subgoal_vocabulary([*self.tasks, self.post_task], self.colors_per_subgoal, self.num_colors)


class GridworldPinpad(TaskWorld):
    """Colored cells of a grid, to be visited in the order of a hidden task."""

    name = "gridworld-pinpad"
    Config = GridworldPinpadConfig
    config: GridworldPinpadConfig

    @property
    def subgoals(self) -> tuple[Task, ...]:
        return self.config.subgoals

    def spec(self) -> DomainSpec:
        config = self.config
        grid = {name: getattr(config, name) for name in ("size", "num_colors", "num_walls", "view", "reach")}
        names = tuple(map(format_task, self.subgoals))
        return DomainSpec({"grid": grid}, {"num_discrete": NUM_ACTIONS}, config.max_steps, names)

    def demonstrations(self, split: Split, n: int, generator: torch.Generator) -> Trajectories:
        check("split", split, Split)
        if split == "validation":  # other grids than any phase draws; small grids are met again by chance
            generator = apart(generator)
        epsilon = self.config.epsilon if split == "pretrain" else self.config.discovery_epsilon
        return self._experts(self.config.tasks, n, generator, epsilon=epsilon)

    def demonstrate(self, task: Sequence[int] | None, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes of experts who make no random moves."""
        return self._experts([self.colors_of(task)], n, generator)

    def _experts(self, tasks: Sequence[Task], n: int, generator: torch.Generator, epsilon: float = 0.0) -> Trajectories:
        options: dict[str, Any] = {"tie_break": self.config.tie_break, "epsilon": epsilon, "subgoals": self.subgoals}
        return expert_trajectories(self.config.grid, tasks, n, generator=generator, device=generator.device, **options)

    def start(self, task: Any, n: int, generator: torch.Generator, max_steps: int) -> PinpadBatch:
        """Unlike in the paper, episodes without a task (`FREE`) do not end when a color is visited."""
        grid = replace(self.config.grid, max_steps=max_steps)
        return start_grids(grid, self.colors_of(task), n, generator, self.subgoals)

    def restart(self, episodes: Trajectories) -> PinpadBatch:
        """The same grids, tasks and starts; the task is what the episode got done, as its labels tell."""
        layouts = Layouts(episodes.states[:, 0, :-1], episodes.states[:, 0, -1])
        return PinpadBatch(self.config.grid, layouts, *self.tasks_done(episodes), subgoals=self.subgoals)

    def augment(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """One of the eight symmetries of the square per row: it changes directions and positions, but no colors."""
        return random_symmetry(self.config.size, states, generator)

    def facts(self, episodes: Trajectories) -> dict[str, Tensor]:
        """color: the first of the current subgoal. place, way: its cell, and its displacement from the agent. move: the
        action taken."""
        subgoals, size = episodes.subgoals, self.config.size
        assert subgoals is not None
        color = torch.tensor([colors[0] for colors in self.subgoals], device=subgoals.device)[subgoals.clamp(min=0)]
        states = episodes.states[:, :-1]
        place, agent = states.gather(2, color[..., None])[..., 0], states[..., -1]
        down, right = place // size - agent // size, place % size - agent % size
        way = (down + size - 1) * (2 * size - 1) + right + size - 1
        facts = {"color": color, "place": place, "way": way, "move": episodes.actions}
        return {name: torch.where(subgoals >= 0, value, -1) for name, value in facts.items()}

    def render(self, states: Tensor) -> Tensor:
        pictures = [render_rgb(self.config, row[:-1], row[-1]) for row in states.tolist()]
        return torch.from_numpy(np.stack(pictures))
