"""The interface of a world: all that phases, analyses and commands know of one.

Axes: b rows (episodes), t steps, a action size, g subgoals; ``*obs`` is the shape of one observation as the model reads
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from metacontroller.data.trajectories import Trajectories
from metacontroller.errors import UserError

Split = Literal["pretrain", "discover"]
"""Which phase demonstrations are for: the paper's for discovery are cleaner."""


class Free:
    """The type of `FREE`."""

    def __repr__(self) -> str:
        return "FREE"


FREE = Free()
"""A task that asks for nothing: the episode ends by time alone, whatever is reached."""


@dataclass(frozen=True)
class DomainSpec:
    """What a model needs to know of a world.

    encoder: what reads an observation, as ``state_embed_readout`` of `Transformer`: ``{"num_continuous": 107}`` for
    vectors, ``{"grid": {...}}`` for grids. action: ``{"num_discrete": 4}`` or ``{"num_continuous": 8}``.
    max_steps: the longest episode. subgoals: names of the labels in demonstrations; () where there are none.
    """

    encoder: dict[str, Any]
    action: dict[str, Any]
    max_steps: int
    subgoals: tuple[str, ...] = ()


@runtime_checkable
class BatchedEnv(Protocol):
    """b episodes that step together. There is no autoreset: a row that has ended ignores its action and gives 0.

    observation (b, *obs): what there is to see now. terminated, truncated, success (b,) bool, never the first two at once; success is the world's
    own word and not a return. steps, subgoals_done (b,) int64: steps taken, whole subgoals of the task done.
    """

    observation: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    steps: Tensor
    subgoals_done: Tensor

    def __len__(self) -> int:
        """b."""
        ...

    def step(self, actions: Tensor) -> Tensor:
        """Takes one action a row, (b,) int64 or (b, a) float; returns the rewards (b,) float32."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keeps only the rows named, int64 (m,), in that order."""
        ...

    def goal(self) -> Tensor:
        """(b,) int64: the subgoal that the task asks for now, -1 for none."""
        ...

    def reached(self) -> Tensor:
        """(b,) int64: the subgoal that the last step reached, -1 for none."""
        ...


class Domain:
    """A world: demonstrations to learn from and episodes to act in.

    A subclass has a ``name`` and a frozen dataclass ``Config``, defines ``spec``, ``demonstrations`` and ``reset``, and
    what it can of the rest. It is found by its name: in ``domains/NAME/domain.py`` (with ``_`` for ``-``), or by an
    entry point of the group ``metacontroller.domains``.
    """

    name: ClassVar[str]
    Config: ClassVar[type]

    def __init__(self, config: Any) -> None:
        self.config = config

    def spec(self) -> DomainSpec:
        """What a model needs to know of this world."""
        raise NotImplementedError

    def demonstrations(self, split: Split, n: int, generator: torch.Generator) -> Trajectories:
        """n episodes of experts, states (n, t + 1, *obs), on the generator's device, which draws all there is to draw.

        Subgoals and segments are labels for evaluation alone, or None.
        """
        raise NotImplementedError

    def reset(
        self, n: int, generator: torch.Generator, *, task: Any = None, max_steps: int | None = None
    ) -> BatchedEnv:
        """n episodes at their start, on the generator's device.

        task: None for the post-training task, `FREE` for none, or what ``parse_task`` returns. max_steps: a time limit
        in place of the world's own.
        """
        raise NotImplementedError

    # what a world may offer

    def augment(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """States (n, t, *obs) under a symmetry of the world, drawn anew for each row: same shape, same subgoals."""
        raise UserError(f"the world {self.name} knows no symmetry; set discover.symmetry_augmentation to false.")

    def seen_transitions(self) -> Tensor | None:
        """(g, g) bool: which subgoal follows which in the demonstrations, each after itself too; None if not known."""
        return None

    def render(self, states: Tensor) -> Tensor:
        """States (t, *obs) of one episode as pictures, uint8 (t, height, width, 3)."""
        raise UserError(f"the world {self.name} draws no pictures; choose one that does.")

    def parse_task(self, text: str) -> Any:
        """A task from its written form, for ``reset``; UserError for what is none."""
        raise UserError(f"the world {self.name} has one task, not {text!r}; leave out --task.")

    def format_task(self, task: Any = None) -> str:
        """A task as text; None is the post-training task."""
        return "post-training task" if task is None else str(task)

    def offers(self, method: str) -> bool:
        """Whether this world defines one of the optional methods."""
        return getattr(type(self), method) is not getattr(Domain, method)
