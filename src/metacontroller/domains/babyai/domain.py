"""BabyAI as a world: its config, the bot's demonstrations, its episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.babyai import observation
from metacontroller.domains.base import BatchedEnv, DomainSpec, Split
from metacontroller.domains.pinpad.tasks import A2_POST, TABLE_A2, Task, check_tasks, format_task, parse_task
from metacontroller.domains.pinpad.worlds import StoredWorld
from metacontroller.errors import UserError
from metacontroller.ranges import MOST_SIDE, Count, Number, ProcessesOr0, Seed, Share, Steps, Whole, check_fields

NUM_ACTIONS = 5
"""Left, right, forward, pick up, drop; as in the part that needs minigrid."""
MORE_OBJECTS = "add to domain.objects"
TOLD = "told:"
"""Prefix of a task on the command line whose mission is shown."""


class Told(NamedTuple):
    """A task whose mission is shown to the model."""

    task: Task


def words_of(task: Task) -> int:
    """Words of a mission: "pick up the red ball" for each object, joined by "then"."""
    return 6 * len(task) - 1


@dataclass(frozen=True, kw_only=True)
class BabyAIConfig:
    """The room, its tasks, the bot and what the model is told. UserError for values out of range."""

    room_size: Annotated[int, Whole(5, MOST_SIDE)] = 8
    """Cells along each side of the room, with its walls; BabyAI's are 8."""
    objects: tuple[str, ...] = ("red ball", "green key", "blue box", "yellow ball")
    """The objects in every room, each a color and a kind (key, ball or box)."""
    view: Literal["symbols", "rgb"] = "symbols"
    """What the agent sees of the cells before it: a symbol each, or a picture of 56 x 56 pixels."""
    max_steps: Steps = 64
    """Steps after which an episode is truncated."""
    tasks: tuple[Task, ...] = TABLE_A2
    """Tasks of the demonstrations, each as the numbers of objects to pick up in order, such as 0-1-2."""
    post_task: Task = A2_POST
    """The post-training task, which reinforcement learning must solve; its mission is never shown."""
    mission_length: Annotated[int, Whole(most=2**12)] = 23
    """Words of a mission that the model can be shown: as many as of four objects. That of the post-training task may
    have more."""
    mission_share: Share = 0.5
    """Share of the episodes for pretraining in which the model is shown the mission; discovery never is."""
    epsilon: Share = 0.1
    """Share of the bot's moves that are random, in demonstrations for pretraining."""
    discovery_epsilon: Share = 0.0
    """The same in demonstrations for discovery."""
    episodes: Count = 20_000
    """Demonstrations on disk for each of the two phases."""
    easiest: Annotated[float, Number(0, 1, above=True, noun="share")] = 1.0
    """Share of them in use, the easiest first; an episode is as difficult as the bot's is long."""
    dataset: str = "datasets/babyai"
    """Folder of the demonstrations on disk. They are made when they are first asked for."""
    dataset_seed: Seed = 0
    """From which the rooms of the demonstrations derive."""
    workers: ProcessesOr0 = 0
    """Processes that make demonstrations; 0: one a core."""

    def __post_init__(self) -> None:
        check_fields(self)
        observation.names_of(self.objects)
        check_tasks([*self.tasks, self.post_task], len(self.objects), MORE_OBJECTS)
        if len(set(self.objects)) < len(self.objects):
            raise UserError(f"objects are {', '.join(self.objects)}; expected no two alike.")
        longest = max(self.tasks, key=len)
        if (words := words_of(longest)) > self.mission_length:
            raise UserError(
                f"mission_length is {self.mission_length}; expected at least {words}, the words of "
                f"{format_task(longest)}."
            )

    @property
    def num_colors(self) -> int:
        """Objects, which tasks number as those of other worlds number colors."""
        return len(self.objects)


class BabyAI(StoredWorld):
    """A room with a few objects, to be picked up in the order of a mission, which may be hidden."""

    name = "babyai"
    modules = ("minigrid", "gymnasium")
    Config = BabyAIConfig
    more_colors = MORE_OBJECTS
    validation_episodes = 2048
    config: BabyAIConfig

    @property
    def rgb(self) -> bool:
        """Whether the agent sees a picture."""
        return self.config.view == "rgb"

    def spec(self) -> DomainSpec:
        config, encoder = self.config, observation.encoder_options(self.config.mission_length, rgb=self.rgb)
        return DomainSpec(encoder, {"num_discrete": NUM_ACTIONS}, config.max_steps, config.objects)

    def recipe(self, split: Split) -> Any:
        """Each split has rooms of its own."""
        first, config = split == "pretrain", self.config
        return self._recipe(
            config.tasks,
            2 * config.dataset_seed + (not first),
            epsilon=config.epsilon if first else config.discovery_epsilon,
            validation=split == "validation",
            workers=config.workers,
        )

    def _recipe(self, tasks: tuple[Task, ...], seed: int, **options: Any) -> Any:
        config = self.config
        return _minigrid().Recipe(
            objects=tuple(observation.names_of(config.objects)),
            tasks=tasks,
            room_size=config.room_size,
            max_steps=config.max_steps,
            mission_length=config.mission_length,
            seed=seed,
            **options,
        )

    def demonstrations(self, split: Split, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes drawn from those on disk, with replacement; each split has a dataset of its own."""
        episodes = self.draw(split, n, generator, self.config.easiest)
        share = self.config.mission_share if split == "pretrain" else 0.0
        return self._as_read(episodes, torch.rand(n, generator=generator, device=generator.device) < share)

    def demonstrate(self, task: Any, n: int, generator: torch.Generator) -> Trajectories:
        """n new episodes of the bot without random moves; the mission is shown if the task is `Told`."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        made = _minigrid().generate(self._recipe((self.colors_of(task),), seed, epsilon=0.0), n)
        shown = torch.full((n,), isinstance(task, Told), device=generator.device)
        return self._as_read(made.to(generator.device), shown)

    def start(self, task: Any, n: int, generator: torch.Generator, max_steps: int) -> BatchedEnv:
        """task: numbers of objects in order, or `Told` of them."""
        tasks = [self.colors_of(task)] * n
        seeds = torch.randint(2**31, (n,), generator=generator, device=generator.device)
        return self._rooms(tasks, seeds, isinstance(task, Told), max_steps)

    def restart(self, episodes: Trajectories) -> BatchedEnv:
        """The same rooms, with the tasks that the labels tell, and the mission where the episode shows it."""
        if episodes.subgoals is None or episodes.segments is None or episodes.seeds is None:
            raise UserError("the episodes carry no labels or no seeds; give demonstrations of this world.")
        pairs = zip(*(part.tolist() for part in self.tasks_done(episodes)), strict=True)
        words = episodes.states[:, 0, -self.config.mission_length :]
        shown = (words > 0).any(1).tolist()
        return self._rooms([task[:length] for task, length in pairs], episodes.seeds, shown, self.config.max_steps)

    def _rooms(
        self, tasks: Sequence[Sequence[int]], seeds: Tensor, shown: bool | Sequence[bool], limit: int
    ) -> BatchedEnv:
        """A room for each task and seed (n,), on the device of the seeds."""
        minigrid, config = _minigrid(), self.config
        objects = observation.names_of(config.objects)
        rooms = [minigrid.Room(objects, task, size=config.room_size, max_steps=limit) for task in tasks]
        for room, seed in zip(rooms, seeds.tolist(), strict=True):
            room.reset(seed=seed)
        return minigrid.RoomBatch(
            rooms,
            mission_length=config.mission_length,
            show_mission=shown,
            tiles=minigrid.tiles() if self.rgb else None,
            device=seeds.device,
        )

    def _as_read(self, episodes: Trajectories, shown: Tensor) -> Trajectories:
        """Episodes as the model reads them, without the mission unless it is shown (n,) bool."""
        states = episodes.states.long()
        states[..., observation.VIEW_CELLS + 1 :] *= shown[:, None, None]
        if self.rgb:
            drawn = observation.with_pictures(states.cpu().numpy(), _minigrid().tiles())
            states = torch.from_numpy(drawn).to(states.device)
        return replace(episodes, states=states)

    def colors_of(self, task: Any) -> Task:
        """The objects of a task, in order; UserError too for one that is `Told` in more words than the model reads."""
        objects = super().colors_of(task.task if isinstance(task, Told) else task)
        if isinstance(task, Told) and (words := words_of(objects)) > self.config.mission_length:
            raise UserError(
                f"task {format_task(objects)} is told in {words} words and the model reads "
                f"{self.config.mission_length}; ask for a shorter one."
            )
        return objects

    def augment(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """One of the eight symmetries of the room per row: it changes left, right and direction, but no object."""
        return observation.random_symmetry(states, generator, rgb=self.rgb)

    def render(self, states: Tensor) -> Tensor:
        """The partial views, as minigrid draws them."""
        if self.rgb:
            return states[..., : observation.PIXELS].unflatten(-1, observation.PICTURE).cpu()
        views = observation.symbols_image(states[..., : observation.VIEW_CELLS].cpu().numpy())
        return torch.from_numpy(np.stack([_minigrid().draw(view) for view in views]))

    def parse_task(self, text: str) -> Any:
        """0-1-2, or told:0-1-2 for a task whose mission is shown."""
        return Told(parse_task(text.removeprefix(TOLD))) if text.startswith(TOLD) else parse_task(text)

    def format_task(self, task: Any = None) -> str:
        return f"{TOLD}{format_task(task.task)}" if isinstance(task, Told) else super().format_task(task)


@cache
def _minigrid() -> Any:
    """The part of this world that plays minigrid; UserError if that is not installed."""
    try:
        from metacontroller.domains.babyai import engine
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "minigrid":
            raise
        raise UserError("minigrid is not installed; install it by: pip install 'metacontroller-rl[babyai]'.") from error
    return engine
