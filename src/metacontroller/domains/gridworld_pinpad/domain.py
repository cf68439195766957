"""gridworld-pinpad as a world: its config, its experts, its episodes (arXiv 2512.20605, §4, tables A1 and A2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from metacontroller.data.batching import apart
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import FREE, Domain, DomainSpec, Free, Split
from metacontroller.domains.gridworld_pinpad.expert import TIE_BREAKS, TieBreak, expert_trajectories
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, random_symmetry
from metacontroller.domains.gridworld_pinpad.rendering import render_rgb
from metacontroller.domains.gridworld_pinpad.simulator import NUM_ACTIONS, FreePinpadBatch, PinpadBatch, start_grids
from metacontroller.domains.pinpad.layouts import Layouts, sample_layouts
from metacontroller.domains.pinpad.tasks import (
    A1_POST,
    TABLE_A1,
    Task,
    check_tasks,
    format_task,
    parse_task,
    subgoal_chunks,
    subgoal_indices,
    subgoal_vocabulary,
    transitions,
)
from metacontroller.errors import UserError
from metacontroller.ranges import COUNT, MOST_SIDE, PROBABILITY, WIDTH, Whole, check_choice, check_fields, check_number

View = Literal["absolute", "egocentric"]


@dataclass(frozen=True, kw_only=True)
class GridworldPinpadConfig:
    """A grid, its tasks, experts and observations; the defaults are the paper's (§4, table A1).

    UserError for values out of range and for impossible tasks.
    """

    size: int = 7
    """G: cells along each side."""
    num_colors: int = 8
    """O: colored cells."""
    num_walls: int = 4
    """W: wall cells."""
    max_steps: int = 100
    """T: steps after which an episode is truncated."""
    tasks: tuple[Task, ...] = TABLE_A1
    """Tasks of the demonstrations, each as colors in order, such as 0-1-2."""
    post_task: Task = A1_POST
    """The post-training task, which reinforcement learning must solve."""
    colors_per_subgoal: int = 2
    """Consecutive colors of a task that form one subgoal, the unit of labels and metrics."""
    tie_break: TieBreak = "random"
    """How experts choose among equally short paths: at random (the paper), or always in the same order."""
    epsilon: float = 0.0
    """Share of the experts' moves that are random, in demonstrations for pretraining."""
    discovery_epsilon: float = 0.0
    """The same in demonstrations for discovery."""
    view: View = "absolute"
    """What a model observes: the cell of each object (the paper), or its displacement from the agent."""
    reach: int | None = None
    """Cells beyond which an egocentric view shows only the direction; none: no limit."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.grid.num_colors)
        check_tasks([self.post_task], self.grid.num_colors)
        if self.tie_break not in TIE_BREAKS:
            raise UserError(f"tie_break is {self.tie_break!r}; expected one of {', '.join(map(repr, TIE_BREAKS))}.")
        check_fields(self, epsilon=PROBABILITY, discovery_epsilon=PROBABILITY, colors_per_subgoal=WIDTH)
        check_fields(self, reach=Whole(most=MOST_SIDE, none=True))
        if self.view not in get_args(View):
            raise UserError(f"view is {self.view!r}; expected 'absolute' or 'egocentric'.")
        _ = self.subgoals  # raises for tasks that are not made of whole subgoals

    @property
    def grid(self) -> PinpadConfig:
        """Size and content of the grid."""
        return PinpadConfig(
            size=self.size, num_colors=self.num_colors, num_walls=self.num_walls, max_steps=self.max_steps
        )

    @property
    def subgoals(self) -> tuple[Task, ...]:
        """The subgoals of all tasks, each as its colors; labels are indices of this tuple."""
        return subgoal_vocabulary([*self.tasks, self.post_task], self.colors_per_subgoal, self.num_colors)


class GridworldPinpad(Domain):
    """Colored cells of a grid, to be visited in the order of a hidden task."""

    name = "gridworld-pinpad"
    Config = GridworldPinpadConfig
    config: GridworldPinpadConfig

    @cached_property
    def subgoals(self) -> tuple[Task, ...]:
        """The vocabulary of subgoals, each as its colors."""
        return self.config.subgoals

    def spec(self) -> DomainSpec:
        config = self.config
        grid = {name: getattr(config, name) for name in ("size", "num_colors", "num_walls", "view", "reach")}
        names = tuple(map(format_task, self.subgoals))
        return DomainSpec({"grid": grid}, {"num_discrete": NUM_ACTIONS}, config.max_steps, names)

    def demonstrations(self, split: Split, n: int, generator: torch.Generator) -> Trajectories:
        check_choice("split", split, get_args(Split))
        if split == "validation":  # other grids than any phase draws; small grids are met again by chance
            generator = apart(generator)
        epsilon = self.config.epsilon if split == "pretrain" else self.config.discovery_epsilon
        return self._experts(self.config.tasks, n, generator, epsilon=epsilon)

    def _experts(self, tasks: Sequence[Task], n: int, generator: torch.Generator, **options: Any) -> Trajectories:
        config = self.config
        check_number("n", n, COUNT)
        return expert_trajectories(
            config.grid,
            tasks,
            n,
            generator=generator,
            tie_break=config.tie_break,
            subgoals=self.subgoals,
            device=generator.device,
            **options,
        )

    def reset(
        self,
        n: int,
        generator: torch.Generator,
        *,
        task: Sequence[int] | Free | None = None,
        max_steps: int | None = None,
    ) -> PinpadBatch:
        """n grids, each with its own random layout; task: colors in order.

        Unlike in the paper, episodes without a task (`FREE`) do not end when a color is visited.
        """
        config = self.config.grid if max_steps is None else replace(self.config.grid, max_steps=max_steps)
        check_number("n", n, COUNT)
        if isinstance(task, str):
            raise UserError(f"task is {task!r}; expected colors in order, such as (0, 1); parse_task reads text.")
        if task is FREE:
            layouts = sample_layouts(config, n, generator, generator.device)
            return FreePinpadBatch(config, layouts, subgoals=self.subgoals)
        colors = self.config.post_task if task is None else tuple(task)  # type: ignore[arg-type]
        check_tasks([colors], config.num_colors)
        subgoal_chunks(colors, self.config.colors_per_subgoal)  # raises for tasks that are not made of whole subgoals
        return start_grids(config, colors, n, generator, self.subgoals)

    def augment(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """One of the eight symmetries of the square per row: it changes directions and positions, but no colors."""
        return random_symmetry(self.config.size, states, generator)

    def demonstrate(self, task: Sequence[int] | None, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes of experts who make no random moves."""
        return self._experts([self.config.post_task if task is None else tuple(task)], n, generator)

    def restart(self, episodes: Trajectories) -> PinpadBatch:
        """The same grids, tasks and starts; the task is what the episode got done, as its labels tell."""
        assert episodes.subgoals is not None
        assert episodes.segments is not None
        colors = torch.tensor(self.subgoals, device=episodes.subgoals.device)
        count = episodes.segments.amax(1) + 1
        order = episodes.segments.new_full((episodes.batch, int(count.max()) + 1), -1)
        order.scatter_(1, episodes.segments % order.shape[1], episodes.subgoals)  # padding goes to the last column
        tasks = torch.where(order[:, :-1, None] >= 0, colors[order[:, :-1].clamp(min=0)], -1).flatten(1)
        layouts = Layouts(episodes.states[:, 0, :-1], episodes.states[:, 0, -1])
        lengths = count * colors.shape[1]
        return PinpadBatch(self.config.grid, layouts, tasks, lengths, subgoals=self.subgoals)

    def facts(self, episodes: Trajectories) -> dict[str, Tensor]:
        """color: the first of the current subgoal. place, way: its cell, and its displacement from the agent. move: the
        action taken."""
        subgoals, size = episodes.subgoals, self.config.size
        assert subgoals is not None
        color = torch.tensor([colors[0] for colors in self.subgoals], device=subgoals.device)[subgoals.clamp(min=0)]
        states = episodes.states[:, :-1]
        place, agent = states.gather(2, color[..., None])[..., 0], states[..., -1]
        down, right = (place // size - agent // size, place % size - agent % size)
        way = (down + size - 1) * (2 * size - 1) + right + size - 1
        named = {"color": color, "place": place, "way": way, "move": episodes.actions}
        return {name: torch.where(subgoals >= 0, value, -1) for name, value in named.items()}

    def seen_transitions(self) -> Tensor:
        seen = torch.eye(len(self.subgoals), dtype=torch.bool)
        for first, second in transitions(subgoal_indices(task, self.subgoals) for task in self.config.tasks):
            seen[first, second] = True
        return seen

    def render(self, states: Tensor) -> Tensor:
        pictures = [render_rgb(self.config.grid, row[:-1], row[-1]) for row in states.tolist()]
        return torch.from_numpy(np.stack(pictures))

    def parse_task(self, text: str) -> Task:
        return parse_task(text)

    def format_task(self, task: Any = None) -> str:
        if task is FREE:
            return "free"
        return format_task(self.config.post_task if task is None else task)
