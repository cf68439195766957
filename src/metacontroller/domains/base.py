"""The interface of a world: everything that phases, analyses and commands use of it.

Axes: b rows (episodes), t steps, a action size, g subgoals; ``*obs`` is the shape of one observation as the model reads
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from metacontroller.data.batching import Generate, apart
from metacontroller.data.trajectories import Trajectories
from metacontroller.errors import UserError
from metacontroller.storage.versions import record

Split = Literal["pretrain", "discover", "validation"]
"""What demonstrations are for: the phase that trains on them, or to judge what was trained. Worlds may make those for
discovery less noisy, as in the paper; those for validation are like them, and no phase trains on any of them."""


class Free:
    """The type of `FREE`."""

    def __repr__(self) -> str:
        return "FREE"


FREE = Free()
"""The task of an episode without a goal: it ends only at the time limit, whatever subgoals are reached."""


LACKING = {
    "augment": "has no symmetry; set discover.symmetry_augmentation to false.",
    "positions": "has no positions; set discover.guided_updates to 0.",
    "decisions": "does not say where experts decide; set clips to 0.",
}
"""Optional methods for which a setting asks, and what is said where a world has none."""


@dataclass(frozen=True)
class DomainSpec:
    """What a model has to know about a world.

    encoder: options of the state encoder, ``state_embed_readout`` of `Transformer`: ``{"num_continuous": 107}`` for
    vectors, ``{"num_discrete": [5, 5]}`` for choices, ``{"image": [64, 64, 3]}``, ``{"picture": {...}}`` for an image
    with categories beside it, ``{"grid": {...}}``.
    action: ``{"num_discrete": 4}``, ``{"num_discrete": [3, 2]}`` for several at once, or ``{"num_continuous": 8}``.
    max_steps: length of the longest episode. subgoals: names of the labels in demonstrations; () if there are none.
    window: steps of an episode that demonstrations show at most at once, so that a model attends to no more in longer
    ones; None where they show whole episodes.
    """

    encoder: dict[str, Any]
    action: dict[str, Any]
    max_steps: int
    subgoals: tuple[str, ...] = ()
    window: int | None = None


@runtime_checkable
class BatchedEnv(Protocol):
    """b episodes that step together. There is no autoreset: a row that has ended ignores its action, with reward 0.

    observation (b, *obs): the current one. terminated, truncated (b,) bool: never both. success (b,) bool: defined by
    the world, not by the return. steps, subgoals_done (b,) int64: steps taken, whole subgoals of the task done.

    Optional: ``replace(rows, other)``, which puts the episodes of another batch in the place of ``rows``, int64 (m,).
    With it `InternalVectorEnv` is fast; then ``select`` must leave shallow copies of the batch as they are.
    Optional: ``begin_again(rows, generator)``, which begins new episodes in ``rows``, for batches whose episodes are
    bound to their rows; their ``replace`` need only take back rows of a shallow copy of the batch.
    Optional: lost (b,) bool, whether an exception of the world ended the episode, which is truncated then.
    """

    observation: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    steps: Tensor
    subgoals_done: Tensor

    def __len__(self) -> int:
        """b, the number of episodes."""
        ...

    def step(self, actions: Tensor) -> Tensor:
        """Takes one action per row, (b,) int64 or (b, a) float; returns the rewards, (b,) float32."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keeps only the rows with indices ``rows``, int64 (m,), in that order."""
        ...

    def goal(self) -> Tensor:
        """(b,) int64: the current subgoal of the task, -1 for none."""
        ...

    def reached(self) -> Tensor:
        """(b,) int64: the subgoal reached by the last step, -1 for none."""
        ...


class Domain:
    """A world: demonstrations to learn from and episodes to act in.

    A subclass has a ``name`` and a frozen dataclass ``Config``, and defines ``spec``, ``demonstrations`` and ``reset``;
    the other methods are optional. It is looked up by its name: in ``domains/NAME/domain.py`` (with ``_`` for ``-``),
    or as an entry point of the group ``metacontroller.domains``.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    steps_a_second: ClassVar[int] = 5
    """How quickly films show its episodes."""
    modules: ClassVar[tuple[str, ...]] = ()
    """Modules of other packages on which its episodes depend, such as ("mujoco",)."""
    gate_tolerance: ClassVar[int] = 1
    """Steps within which a switch and a change of subgoal count as the same."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def spec(self) -> DomainSpec:
        """What a model has to know about this world."""
        raise NotImplementedError

    def demonstrations(self, split: Split, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes of experts, states (n, t + 1, *obs), on the generator's device.

        All randomness comes from the generator. Subgoals and segments are labels for evaluation only, or None.
        A world that makes its episodes anew each time may make those for validation as those for discovery:
        `demonstrations` hands it a generator apart. One that keeps episodes keeps others for validation.
        """
        raise NotImplementedError

    def reset(
        self, n: int, generator: torch.Generator, *, task: Any = None, max_steps: int | None = None
    ) -> BatchedEnv:
        """Starts n episodes, on the generator's device.

        task: None for the post-training task, `FREE` for no task, or a result of ``parse_task``. max_steps: a time
        limit instead of the world's own.
        """
        raise NotImplementedError

    # optional methods

    def check_acting(self) -> None:
        """UserError if the world has demonstrations only, and no episodes to act in."""

    def validates(self, phase: Split) -> bool:
        """Whether the loss on validation episodes may be set beside the training loss of a phase: where both kinds of
        episodes are drawn alike."""
        return phase == "discover"

    def augment(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """Symmetry augmentation: states (n, t, *obs) under a random symmetry of the world, one per row; same shape.

        It must not change subgoals. UserError if the world has none.
        """
        raise self.lacking("augment")

    def positions(self, states: Tensor) -> Tensor:
        """Where things are as seen from the agent, (n, t, *obs) -> (n, t, p): numbers of which the end of a long action
        is a linear function, see `objectives.fixed_points`. UserError if the world has none."""
        raise self.lacking("positions")

    def decisions(self, episodes: Trajectories) -> Tensor:
        """(b, t) bool: steps of demonstrations at which an expert may decide where to go, such as where it enters a
        room; for clips of them, see `objectives.clips`. UserError if the world does not say."""
        raise self.lacking("decisions")

    def seen_transitions(self) -> Tensor | None:
        """(g, g) bool: which subgoal (column) follows which (row) in the demonstrations, or None if not known.

        The diagonal is true.
        """
        return None

    def demonstrate(self, task: Any, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes of experts who do one task, as of ``reset``; UserError if the world has no experts to ask."""
        raise UserError(f"the world {self.name} has no expert to ask; define demonstrate() of it.")

    def restart(self, episodes: Trajectories) -> BatchedEnv:
        """Labelled episodes at their first step, with the same tasks, to be played anew; UserError if it cannot be."""
        raise UserError(f"the world {self.name} cannot start where an episode did; define restart() of it.")

    def facts(self, episodes: Trajectories) -> dict[str, Tensor]:
        """What a code might name besides the subgoal, by name, such as a place: (b, t) int64 from 0, -1 for nothing."""
        return {}

    def render(self, states: Tensor) -> Tensor:
        """Pictures of the states (t, *obs) of one episode, uint8 (t, height, width, 3); UserError if there are none."""
        raise UserError(f"the world {self.name} has no pictures; choose a world that renders.")

    def versions(self) -> dict[str, str]:
        """The record of this world as it is installed (`storage.versions`): the versions of the packages on which its
        episodes depend. Datasets and checkpoints keep it, and loading one warns of what is otherwise here."""
        return record(self.name, {type(self).__module__.partition(".")[0], *self.modules})

    def data_versions(self) -> dict[str, str]:
        """The record of where the demonstrations come from, which may be from elsewhere: what learns from them keeps
        it."""
        return self.versions()

    def parse_task(self, text: str) -> Any:
        """Parses a task for ``reset``; UserError for an invalid one."""
        raise UserError(f"the world {self.name} has one task, not {text!r}; leave out --task.")

    def format_task(self, task: Any = None) -> str:
        """A task as text, the inverse of ``parse_task``; None is the post-training task."""
        return "post-training task" if task is None else str(task)

    def lacking(self, method: str) -> UserError:
        """What to tell whose settings ask for an optional method that this world does not define, one of `LACKING`."""
        return UserError(f"the world {self.name} {LACKING[method]}")

    def offers(self, method: str) -> bool:
        """Whether this world defines the optional method of this name."""
        return getattr(type(self), method) is not getattr(Domain, method)


def demonstrations(domain: Domain, split: Split) -> Generate:
    """The source of one split's episodes; those for validation come from streams that no phase trains on."""
    if split == "validation":
        return lambda n, generator: domain.demonstrations(split, n, apart(generator))
    return lambda n, generator: domain.demonstrations(split, n, generator)
