"""ant-pinpad as a world: its config, its expert's demonstrations, its episodes (arXiv 2512.20605, §4, table A2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.ant_pinpad.dataset import NAME, Recipe, generate, versions
from metacontroller.domains.ant_pinpad.expert import Expert
from metacontroller.domains.ant_pinpad.layouts import Arena, Camera, direction_fields
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
from metacontroller.domains.base import DomainSpec, Split
from metacontroller.domains.pinpad.tasks import A2_POST, TABLE_A2, Task, check_tasks, color_shifts, format_task
from metacontroller.domains.pinpad.worlds import StoredWorld
from metacontroller.errors import UserError
from metacontroller.ranges import Count, ProcessesOr0, Seed
from metacontroller.storage.versions import check_versions

SHIPPED, UNTRAINED = "shipped", "untrained"
SHIPPED_EXPERT = Path(__file__).parent / "expert.safetensors"


@dataclass(frozen=True, kw_only=True)
class AntPinpadConfig(Arena):
    """A plane of cells, its tasks and its expert; the defaults are the paper's where it gives them (§4, table A2).

    UserError for values out of range and for impossible tasks.
    """

    tasks: tuple[Task, ...] = TABLE_A2
    """Tasks of the demonstrations, each as colors in order, such as 0-2-1."""
    post_task: Task = A2_POST
    """The post-training task, which reinforcement learning must solve."""
    expert: str = SHIPPED
    """Who demonstrates: shipped, untrained (random weights), or a file that examples/ant_expert.py wrote."""
    only_successes: bool = True
    """Keep only demonstrations that succeed (our choice; the paper is silent)."""
    episodes: Count = 10_000
    """Demonstrations on disk for each of the two phases."""
    dataset: str = "datasets/ant"
    """Folder of the demonstrations on disk. They are made when they are first asked for."""
    dataset_seed: Seed = 0
    """From which the demonstrations derive."""
    encoder: Literal["plane", "linear"] = "plane"
    """How models read an observation: plane reads cells off it by tables, see `PlaneEncoder` (our choice); linear is a
    linear map of its numbers."""
    symmetry_augmentation: bool = True
    """Draw demonstrations for training in turned worlds with other colors: sixteen times as many (our choice)."""
    camera: Camera = "above"
    """From where pictures are taken: above shows the whole plane, follow the ant."""
    threads: ProcessesOr0 = 0
    """Threads of MuJoCo, which change no number; 0: one a core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tasks(self.tasks, self.num_colors)
        check_tasks([self.post_task], self.num_colors)
        if self.expert not in (SHIPPED, UNTRAINED) and Path(self.expert).is_file():
            object.__setattr__(self, "expert", str(Path(self.expert).resolve()))  # read from other folders too

    @property
    def arena(self) -> Arena:
        """Size and content of the plane alone."""
        return Arena(**{part.name: getattr(self, part.name) for part in fields(Arena)})


class AntPinpad(StoredWorld):
    """Colored cells of a plane, to be visited by MuJoCo's ant in the order of a hidden task."""

    name = NAME
    Config = AntPinpadConfig
    steps_a_second = round(1 / STEP_SECONDS)
    gate_tolerance = 10
    validation_episodes = 512
    config: AntPinpadConfig

    def spec(self) -> DomainSpec:
        arena = self.config.arena
        size, names = observation_size(arena), tuple(map(format_task, self.subgoals))
        plane = {"dim_state": size, "size": arena.size, "objects": arena.num_objects}
        states = {"plane": plane} if self.config.encoder == "plane" else {"num_continuous": size}
        return DomainSpec(states, {"num_continuous": NUM_ACTIONS}, arena.max_steps, names)

    def versions(self) -> dict[str, str]:
        return versions()

    def recipe(self, split: Split) -> Recipe:
        """Each split has a seed of its own, and so other episodes."""
        splits = get_args(Split)
        seed = len(splits) * self.config.dataset_seed + splits.index(split)
        return self._recipe(self.config.tasks, seed, mean_actions=split != "pretrain")

    def _recipe(self, tasks: tuple[Task, ...], seed: int, *, mean_actions: bool = True) -> Recipe:
        config = self.config
        return Recipe(
            arena=config.arena,
            expert=_expert(config.expert, config.cell_size),
            tasks=tasks,
            mean_actions=mean_actions,
            only_successes=config.only_successes,
            seed=seed,
            threads=config.threads,
        )

    def demonstrations(self, split: Split, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes drawn from those on disk, with replacement. Each split has a dataset of its own: actions are
        sampled in that for pretraining, and the expert's mean ones in the others (§2).

        For training with ``symmetry_augmentation``, each is drawn in a world turned by 0 to 3 right angles, with its
        colors counted on by a number under which the tasks stay the same ones. Those are as likely, and walked alike,
        so there are sixteen times as many."""
        episodes = self.draw(split, n, generator)
        varied = self.config.symmetry_augmentation and split != "validation"
        return self._varied(episodes, generator) if varied else episodes

    def _varied(self, episodes: Trajectories, generator: torch.Generator) -> Trajectories:
        """Other episodes that the expert would show as likely, drawn for each of these."""
        config, device, n = self.config, generator.device, episodes.batch
        shifts = torch.tensor(color_shifts(config.tasks, config.num_colors), device=device)
        quarter = torch.randint(4, (n,), generator=generator, device=device)
        shift = shifts[torch.randint(len(shifts), (n,), generator=generator, device=device)]
        goals = episodes.subgoals
        assert goals is not None
        each = (-quarter % LEGS)[:, None].expand(episodes.actions.shape[:2]).flatten()
        return replace(
            episodes,
            states=turn_around(shift_colors(config, episodes.states, shift), quarter),
            actions=turn_torques(episodes.actions.flatten(0, 1), each).view_as(episodes.actions),
            subgoals=torch.where(goals < 0, goals, (goals + shift[:, None]) % config.num_colors),
        )

    def demonstrate(self, task: Sequence[int] | None, n: int, generator: torch.Generator) -> Trajectories:
        """n new episodes of the expert with its mean actions."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return generate(self._recipe((self.colors_of(task),), seed), n).to(generator.device)

    def start(self, task: Any, n: int, generator: torch.Generator, max_steps: int) -> AntBatch:
        """An episode without a task (`FREE`) does not end for a color, but as others where the ant falls, walks into a
        wall or leaves the plane: from there it could not go on."""
        arena = replace(self.config.arena, max_steps=max_steps)
        return start_ants(arena, [self.colors_of(task)] * n, generator, self.config.threads)

    def restart(self, episodes: Trajectories) -> AntBatch:
        """The same layouts, tasks and starts, as exactly as observations tell; the task is what the episode got done,
        as its labels say."""
        arena, first = self.config.arena, episodes.states[:, 0]
        tasks = self.tasks_done(episodes)
        return AntBatch(arena, objects_of(arena, first), state_of(arena, first), *tasks, self.config.threads)

    def augment(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """The world turned by 0 to 3 right angles, at random for each row, and the ant's legs renamed. It changes
        directions and places, but no colors. The ant has no mirror image here: its legs would have to change places."""
        quarter = torch.randint(4, (len(states),), generator=generator, device=states.device)
        return turn_around(states, quarter)

    def positions(self, states: Tensor) -> Tensor:
        """Place, colors and wall relative to it, and the place within its cell: all of an observation but the body."""
        parts = parts_of(self.config, states)
        return torch.cat([parts.place, parts.relative.flatten(-2), parts.local], -1)

    def decisions(self, episodes: Trajectories) -> Tensor:
        """Where the ant enters a cell."""
        cell = self._cells(episodes)
        return F.pad(cell[:, 1:] != cell[:, :-1], (1, 0)) & episodes.mask()

    def _cells(self, episodes: Trajectories) -> Tensor:
        """(b, t) int64: the cell in which the ant is at each step, -1 beyond the plane."""
        place = episodes.states[:, :-1, PROPRIOCEPTION : PROPRIOCEPTION + 2]
        return self.config.cell(place.double() * self.config.half)

    def facts(self, episodes: Trajectories) -> dict[str, Tensor]:
        """color: to go to. place: its cell. cell: the ant's. way: the direction of the shortest way, in the world."""
        goal = episodes.subgoals
        assert goal is not None
        color, cell = goal.clamp(min=0), self._cells(episodes).clamp(min=0)
        objects = objects_of(self.config, episodes.states[:, 0])
        rows = torch.arange(len(goal), device=goal.device)[:, None]
        way = direction_fields(self.config, objects)[rows, color, cell]
        facts = {"color": color, "place": objects.gather(1, color), "cell": cell, "way": way}
        return {name: torch.where(goal >= 0, value, -1) for name, value in facts.items()}

    def render(self, states: Tensor) -> Tensor:
        from metacontroller.domains.ant_pinpad.rendering import painter

        arena = self.config.arena
        objects, brush = objects_of(arena, states[0]), painter(arena)
        pictures = [brush.draw(state, objects, self.config.camera) for state in state_of(arena, states)]
        return torch.stack([torch.from_numpy(picture) for picture in pictures])

    def offers(self, method: str) -> bool:
        """Pictures are offered where this machine can draw them."""
        return super().offers(method) and (method != "render" or _can_draw())


def _can_draw() -> bool:
    try:
        from metacontroller.domains.ant_pinpad.rendering import can_draw
    except UserError:  # MuJoCo is not installed
        return False
    return can_draw()


@cache
def _expert(name: str, cell_size: float) -> Expert:
    if name == UNTRAINED:
        return Expert.untrained()
    path = SHIPPED_EXPERT if name == SHIPPED else Path(name)
    expert, about = Expert.load(path)
    check_versions(path, about.get("versions", {}), versions())
    learned = about.get("arena", {}).get("cell_size", cell_size)
    if learned != cell_size:
        warnings.warn(
            f"the expert {name} learned on cells of {learned} m and cell_size is {cell_size}; it may fail there.",
            stacklevel=2,
        )
    return expert
