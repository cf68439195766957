"""ant-pinpad as a world: its config, its expert's demonstrations, its episodes (arXiv 2512.20605, §4, table A2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.data.store import TrajectoryStore
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.ant_pinpad.dataset import NAME, Recipe, generate, open_dataset, versions
from metacontroller.domains.ant_pinpad.expert import Expert
from metacontroller.domains.ant_pinpad.layouts import CAMERAS, Arena, Camera, direction_fields
from metacontroller.domains.ant_pinpad.observation import (
    NUM_ACTIONS,
    PROPRIOCEPTION,
    objects_of,
    observation_size,
    parts_of,
    state_of,
)
from metacontroller.domains.ant_pinpad.simulator import STEP_SECONDS, AntBatch, start_ants
from metacontroller.domains.ant_pinpad.symmetry import LEGS, shift_colors, turn_around, turn_torques
from metacontroller.domains.base import FREE, Domain, DomainSpec, Free, Split
from metacontroller.domains.pinpad.tasks import (
    A2_POST,
    TABLE_A2,
    Task,
    check_tasks,
    color_shifts,
    format_task,
    parse_task,
    transitions,
)
from metacontroller.errors import UserError
from metacontroller.ranges import COUNT, MOST_PROCESSES, SEED, Whole, check_choice, check_fields
from metacontroller.storage.versions import check_versions

SHIPPED, UNTRAINED = "shipped", "untrained"
SHIPPED_EXPERT = Path(__file__).parent / "expert.safetensors"
VALIDATION_EPISODES = 512
"""Demonstrations on disk for validation, at most."""


@dataclass(frozen=True, kw_only=True)
class AntPinpadConfig:
    """A plane of cells, its tasks and its expert; the defaults are the paper's where it gives them (§4, table A2).

    UserError for values out of range and for impossible tasks.
    """

    size: int = 4
    """G: cells along each side."""
    num_colors: int = 4
    """O: colored cells; each is a subgoal."""
    num_walls: int = 1
    """W: wall cells."""
    max_steps: int = 500
    """T: steps after which an episode is truncated."""
    cell_size: float = 1.5
    """Side of a cell in meters (our choice; the paper is silent)."""
    start_yaw: float = math.pi
    """The largest yaw at the start to either side, in radians; pi is any, the paper's. The ant's four legs are alike:
    with pi / 4 it starts as with any yaw, but for which leg is called the first."""
    tasks: tuple[Task, ...] = TABLE_A2
    """Tasks of the demonstrations, each as colors in order, such as 0-2-1."""
    post_task: Task = A2_POST
    """The post-training task, which reinforcement learning must solve."""
    expert: str = SHIPPED
    """Who demonstrates: shipped, untrained (random weights), or a file that examples/ant_expert.py wrote."""
    only_successes: bool = True
    """Keep only demonstrations that succeed (our choice; the paper is silent)."""
    episodes: int = 10_000
    """Demonstrations on disk for each of the two phases."""
    dataset: str = "datasets/ant"
    """Folder of the demonstrations on disk. They are made when they are first asked for."""
    dataset_seed: int = 0
    """From which the demonstrations derive."""
    encoder: Literal["plane", "linear"] = "plane"
    """How models read an observation: plane reads cells off it by tables, see `PlaneEncoder` (our choice); linear is a
    linear map of its numbers."""
    symmetry_augmentation: bool = True
    """Draw demonstrations for training in turned worlds with other colors: sixteen times as many (our choice)."""
    camera: Camera = "above"
    """From where pictures are taken: above shows the whole plane, follow the ant."""
    threads: int = 0
    """Threads of MuJoCo, which change no number; 0: one a core."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self.arena.num_colors)
        check_tasks([self.post_task], self.arena.num_colors)
        check_fields(self, episodes=COUNT, threads=Whole(0, MOST_PROCESSES), dataset_seed=SEED)
        check_choice("encoder", self.encoder, ("plane", "linear"))
        check_choice("camera", self.camera, CAMERAS)
        if self.expert not in (SHIPPED, UNTRAINED) and Path(self.expert).is_file():
            object.__setattr__(self, "expert", str(Path(self.expert).resolve()))  # read from other folders too

    @property
    def arena(self) -> Arena:
        """Size and content of the plane."""
        return Arena(**{part.name: getattr(self, part.name) for part in fields(Arena)})


class AntPinpad(Domain):
    """Colored cells of a plane, to be visited by MuJoCo's ant in the order of a hidden task."""

    name = NAME
    Config = AntPinpadConfig
    steps_a_second = round(1 / STEP_SECONDS)
    gate_tolerance = 10
    config: AntPinpadConfig

    def spec(self) -> DomainSpec:
        arena = self.config.arena
        names = tuple(map(str, range(arena.num_colors)))
        size, actions = observation_size(arena), {"num_continuous": NUM_ACTIONS}
        plane = {"dim_state": size, "size": arena.size, "objects": arena.num_objects}
        states = {"plane": plane} if self.config.encoder == "plane" else {"num_continuous": size}
        return DomainSpec(states, actions, arena.max_steps, names)

    def demonstrations(self, split: Split, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes drawn from those on disk, with replacement. Each split has a dataset of its own: actions are
        sampled in that for pretraining, and the expert's mean ones in the others (§2).

        For training with ``symmetry_augmentation``, each is drawn in a world turned by 0 to 3 right angles, with its
        colors counted on by a number under which the tasks stay the same ones. Those are as likely, and walked alike,
        so there are sixteen times as many."""
        store, device = self.store(split), generator.device
        rows = torch.randint(len(store), (n,), generator=generator, device=device)
        episodes = store.read(rows.cpu()).to(device)
        varied = self.config.symmetry_augmentation and split != "validation"
        return self._varied(episodes, generator) if varied else episodes

    def _varied(self, episodes: Trajectories, generator: torch.Generator) -> Trajectories:
        """Other episodes that the expert would show as likely, drawn for each of these."""
        arena, device, n = self.config.arena, generator.device, episodes.batch
        shifts = torch.tensor(color_shifts(self.config.tasks, arena.num_colors), device=device)
        quarter = torch.randint(4, (n,), generator=generator, device=device)
        shift = shifts[torch.randint(len(shifts), (n,), generator=generator, device=device)]
        goals = episodes.subgoals
        assert goals is not None
        each = (-quarter % LEGS)[:, None].expand(episodes.actions.shape[:2]).flatten()
        return replace(
            episodes,
            states=turn_around(shift_colors(arena, episodes.states, shift), quarter),
            actions=turn_torques(episodes.actions.flatten(0, 1), each).view_as(episodes.actions),
            subgoals=torch.where(goals < 0, goals, (goals + shift[:, None]) % arena.num_colors),
        )

    def store(self, split: Split) -> TrajectoryStore:
        """The demonstrations of one split on disk, written first if they are not there."""
        return _open(self.config, split)

    def demonstrate(self, task: Sequence[int] | None, n: int, generator: torch.Generator) -> Trajectories:
        """n new episodes of the expert with its mean actions."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        recipe = _recipe(self.config, (self._task(task),), mean_actions=True, seed=seed)
        return generate(recipe, n).to(generator.device)

    def reset(
        self,
        n: int,
        generator: torch.Generator,
        *,
        task: Sequence[int] | Free | None = None,
        max_steps: int | None = None,
    ) -> AntBatch:
        """n ants, each on its own random layout; task: colors in order.

        An episode without a task (`FREE`) does not end for a color, but as others where the ant falls, walks into a
        wall or leaves the plane: from there it could not go on.
        """
        colors = () if task is FREE else self._task(task)  # type: ignore[arg-type]
        arena = self.config.arena if max_steps is None else _limited(self.config.arena, max_steps)
        return start_ants(arena, [colors] * n, generator, self.config.threads)

    def _task(self, task: Sequence[int] | None) -> Task:
        colors = self.config.post_task if task is None else tuple(task)
        check_tasks([colors], self.config.num_colors)
        return colors

    def augment(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """The world turned by 0 to 3 right angles, at random for each row, and the ant's legs renamed. It changes
        directions and places, but no colors. The ant has no mirror image here: its legs would have to change places."""
        quarter = torch.randint(4, (len(states),), generator=generator, device=states.device)
        return turn_around(states, quarter)

    def positions(self, states: Tensor) -> Tensor:
        """Place, colors and wall relative to it, and the place within its cell: all of an observation but the body."""
        parts = parts_of(self.config.arena, states)
        return torch.cat([parts.place, parts.relative.flatten(-2), parts.local], -1)

    def decisions(self, episodes: Trajectories) -> Tensor:
        """Where the ant enters a cell."""
        cell = self._cells(episodes)
        return F.pad(cell[:, 1:] != cell[:, :-1], (1, 0)) & episodes.mask()

    def _cells(self, episodes: Trajectories) -> Tensor:
        """(b, t) int64: the cell in which the ant is at each step, -1 beyond the plane."""
        arena, place = self.config.arena, episodes.states[:, :-1, PROPRIOCEPTION : PROPRIOCEPTION + 2]
        return arena.cell(place.double() * arena.half)

    def restart(self, episodes: Trajectories) -> AntBatch:
        """The same layouts, tasks and starts, as exactly as observations tell; the task is what the episode got done,
        as its labels say."""
        assert episodes.subgoals is not None
        assert episodes.segments is not None
        arena, first = self.config.arena, episodes.states[:, 0]
        count = episodes.segments.amax(1) + 1
        tasks = episodes.segments.new_full((episodes.batch, int(count.max()) + 1), -1)
        tasks.scatter_(1, episodes.segments % tasks.shape[1], episodes.subgoals)  # padding goes to the last column
        state = state_of(arena, first)
        return AntBatch(arena, objects_of(arena, first), state, tasks[:, :-1], count, self.config.threads)

    def facts(self, episodes: Trajectories) -> dict[str, Tensor]:
        """color: to go to. place: its cell. cell: the ant's. way: the direction of the shortest way, in the world."""
        assert episodes.subgoals is not None
        arena, goal = self.config.arena, episodes.subgoals
        named = {"color": goal, "place": goal, "cell": goal, "way": goal}
        cell = self._cells(episodes).clamp(min=0)
        objects = objects_of(arena, episodes.states[:, 0])
        fields = direction_fields(arena, objects)
        rows = torch.arange(len(goal), device=goal.device)[:, None]
        asked = goal.clamp(min=0)
        named |= {"place": objects.gather(1, asked), "cell": cell, "way": fields[rows, asked, cell]}
        return {name: torch.where(goal >= 0, value, -1) for name, value in named.items()}

    def seen_transitions(self) -> Tensor:
        seen = torch.eye(self.config.num_colors, dtype=torch.bool)
        for first, second in transitions(self.config.tasks):
            seen[first, second] = True
        return seen

    def render(self, states: Tensor) -> Tensor:
        from metacontroller.domains.ant_pinpad.rendering import painter

        arena = self.config.arena
        objects, brush = objects_of(arena, states[0]), painter(arena)
        pictures = [brush.draw(state, objects, self.config.camera) for state in state_of(arena, states)]
        return torch.stack([torch.from_numpy(picture) for picture in pictures])

    def offers(self, method: str) -> bool:
        """Pictures are offered where this machine can draw them."""
        return super().offers(method) and (method != "render" or _can_draw())

    def versions(self) -> dict[str, str]:
        return versions()

    def parse_task(self, text: str) -> Task:
        return parse_task(text)

    def format_task(self, task: Any = None) -> str:
        if task is FREE:
            return "free"
        return format_task(self.config.post_task if task is None else task)


def _limited(arena: Arena, max_steps: int) -> Arena:
    return Arena(**{**vars(arena), "max_steps": max_steps})


def _can_draw() -> bool:
    try:
        from metacontroller.domains.ant_pinpad.rendering import can_draw
    except UserError:  # MuJoCo is not installed
        return False
    return can_draw()


@cache
def _expert(name: str, arena: Arena) -> Expert:
    if name == UNTRAINED:
        return Expert.untrained()
    path = SHIPPED_EXPERT if name == SHIPPED else Path(name)
    expert, about = Expert.load(path)
    check_versions(path, about.get("versions", {}), versions())
    learned = about.get("arena", {}).get("cell_size", arena.cell_size)
    if learned != arena.cell_size:
        warnings.warn(
            f"the expert {name} learned on cells of {learned} m and cell_size is {arena.cell_size}; it may fail there.",
            stacklevel=2,
        )
    return expert


def _recipe(config: AntPinpadConfig, tasks: tuple[Task, ...], *, mean_actions: bool, seed: int) -> Recipe:
    return Recipe(
        arena=config.arena,
        expert=_expert(config.expert, config.arena),
        tasks=tasks,
        mean_actions=mean_actions,
        only_successes=config.only_successes,
        seed=seed,
        threads=config.threads,
    )


@cache
def _open(config: AntPinpadConfig, split: Split) -> TrajectoryStore:
    """The dataset of a split; each has a seed of its own, and so other episodes."""
    splits = get_args(Split)
    seed = len(splits) * config.dataset_seed + splits.index(split)
    recipe = _recipe(config, config.tasks, mean_actions=split != "pretrain", seed=seed)
    episodes = min(VALIDATION_EPISODES, config.episodes) if split == "validation" else config.episodes
    return open_dataset(recipe, episodes, Path(config.dataset))
