"""Episodes of the pinpad worlds that step together, with all rules but those of moving, and how they are recorded.

Axes: b episode, o object (every color, then every wall), l position in a task, v subgoal of the vocabulary, u color of
a subgoal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import BatchedEnv
from metacontroller.domains.pinpad.layouts import Board, object_lookup
from metacontroller.domains.pinpad.tasks import Task, single_colors
from metacontroller.errors import UserError


class PinpadEpisodes(BatchedEnv):
    """b episodes that step together; each has its own layout and task and ends on its own.

    A colored cell is visited by entering it from another cell. Visiting the next color of the task advances it;
    visiting the last one terminates the episode with reward 1, visiting any other color than the next terminates it
    with reward 0. An episode that has not terminated is truncated after `Board.max_steps` steps. One that has ended
    stays as it is. A task of length 0 is none: no color ends the episode, and it never succeeds.

    Subgoals are the units of tasks: single colors, or runs of equally many colors (`subgoal_vocabulary`). They change
    no rule, only what `goal`, `subgoals_done` and `reached` return.

    Attributes:
        objects: int64 (b, o), their cells.
        tasks, task_lengths: int64 (b, l), padded with -1, and (b,).
        subgoals: the vocabulary, by default every color.
        colors_done: int64 (b,), colors of the task visited so far.
        steps: int64 (b,), steps taken before the episode ended.
        terminated, truncated: bool (b,), never both.
        row_fields: names of all tensors with a row for each episode.

    UserError for tasks, lengths and subgoals that do not fit.
    """

    row_fields: ClassVar[tuple[str, ...]] = (
        *("objects", "task_lengths", "colors_done", "steps", "terminated", "truncated"),
        *("_asked", "_padded", "_lookup", "_visited", "_recent"),
    )

    def __init__(
        self, board: Board, objects: Tensor, tasks: Tensor, task_lengths: Tensor, subgoals: Sequence[Task] | None = None
    ) -> None:
        self.subgoals = single_colors(board.num_colors) if subgoals is None else tuple(subgoals)
        _check_subgoals(board, self.subgoals)
        _check_tasks(board, len(objects), tasks, task_lengths)
        self.board, self.objects, self.task_lengths = board, objects, task_lengths
        self._asked = task_lengths > 0
        self.colors_done, self.steps = torch.zeros_like(task_lengths), torch.zeros_like(task_lengths)
        self.terminated = torch.zeros_like(task_lengths, dtype=torch.bool)
        self.truncated = torch.zeros_like(self.terminated)
        unit, self._longest = self.colors_per_subgoal, tasks.shape[1]
        # One more subgoal, so that a finished task has a next one too: one that nothing equals.
        self._padded = F.pad(tasks, (0, unit + -self._longest % unit), value=-1)
        self._lookup = object_lookup(board, objects)
        self._visited = torch.full_like(task_lengths, -1, dtype=torch.int16)
        # (b, u - 1): the colors visited last before the last step, oldest first; -1 where there were fewer.
        self._recent = self._visited[:, None].repeat(1, unit - 1)
        self._vocabulary = torch.tensor(self.subgoals, dtype=torch.int16, device=objects.device)  # (v, u)
        self._of_colors = self.subgoals == single_colors(board.num_colors)  # a subgoal's index is its color

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def tasks(self) -> Tensor:
        """int64 (b, l), padded with -1."""
        return self._padded[:, : self._longest]

    @property
    def colors_per_subgoal(self) -> int:
        """Number of colors in a subgoal."""
        return len(self.subgoals[0])

    @property
    def success(self) -> Tensor:
        """bool (b,): whether the task is done; an episode without a task never succeeds."""
        return (self.colors_done == self.task_lengths) & self._asked

    @property
    def subgoals_done(self) -> Tensor:
        """int64 (b,): number of whole subgoals of the task done so far."""
        return self.colors_done if self._of_colors else self.colors_done // self.colors_per_subgoal

    def next_color(self) -> Tensor:
        """int64 (b,): the color to visit next, -1 once the task is done and without one."""
        return self._padded.gather(1, self.colors_done[:, None]).squeeze(1)

    def goal(self) -> Tensor:
        """int64 (b,): index of the current subgoal, until all its colors are visited.

        -1 once the task is done, without one, and where the vocabulary lacks the subgoal.
        """
        if self._of_colors:
            return self.next_color()
        return self.task_goals().gather(1, self.subgoals_done[:, None]).squeeze(1)

    def task_goals(self) -> Tensor:
        """int64 (b, l / u + 1): index of each subgoal of the task, -1 for none, as at the end."""
        return self._index_of(self._padded.unflatten(1, (-1, self.colors_per_subgoal)))

    def visited_color(self) -> Tensor:
        """int64 (b,): the color visited by the last step, part of the task or not, else -1."""
        return self._visited.to(torch.int64)

    def reached(self) -> Tensor:
        """int64 (b,): index of the subgoal that the last step completed, part of the task or not, else -1.

        A subgoal of one color is completed by visiting it, one of several when the last colors visited are its colors.
        """
        if self._of_colors:
            return self.visited_color()
        return self._index_of(torch.cat([self._recent, self._visited[:, None]], 1))

    def _index_of(self, chunks: Tensor) -> Tensor:
        """Index in the vocabulary of chunks of colors (..., u), -1 where they are not in it."""
        equal = (chunks[..., None, :] == self._vocabulary).all(-1)
        return torch.where(equal.any(-1), equal.to(torch.uint8).argmax(-1), -1)

    def visit(self, colors: Tensor, running: Tensor, failed: Tensor | None = None) -> Tensor:
        """Counts a step of all episodes and returns its rewards, float32 (b,).

        colors: int16 (b,), the color just visited, -1 for none. running: bool (b,), which had not ended. failed: bool
        (b,), which of those end for a reason other than colors.
        """
        if self.colors_per_subgoal > 1:
            newer = torch.cat([self._recent[:, 1:], self._visited[:, None]], 1)
            self._recent = torch.where(self._visited[:, None] >= 0, newer, self._recent)
        self._visited, entered = colors, colors >= 0
        correct = entered & (colors == self.next_color())
        wrong = (entered ^ correct) & self._asked
        self.colors_done = self.colors_done + correct
        self.steps = self.steps + running
        success = correct & (self.colors_done == self.task_lengths)
        self.terminated = self.terminated | success | (wrong if failed is None else wrong | failed)
        self.truncated = (self.steps >= self.board.max_steps) & ~self.terminated
        return success.to(torch.float32)

    def select(self, rows: Tensor) -> None:
        """Keeps only the episodes of the given rows (indices or a boolean mask), in that order."""
        for name in self.row_fields:
            setattr(self, name, getattr(self, name)[rows])

    def replace(self, rows: Tensor, other: PinpadEpisodes) -> None:
        """Puts the episodes of another batch in the place of rows, int64 (k,).

        UserError unless it has the same subgoals and tasks padded to the same length.
        """
        expected = (self.subgoals, (len(rows), self._longest))
        if (other.subgoals, tuple(other.tasks.shape)) != expected:
            raise UserError(
                f"the new episodes have subgoals {other.subgoals} and tasks of shape {tuple(other.tasks.shape)}; "
                f"expected {expected[0]} and {expected[1]}, padded to this batch's width."
            )
        for name in self.row_fields:
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(other, name)))


def record(env: PinpadEpisodes, act: Callable[[], Tensor], look: Callable[[], Tensor] | None = None) -> Trajectories:
    """Plays every episode to its end. act: returns the next actions, (b,) or (b, a); ended episodes ignore theirs.
    look: returns the states, (b, ...), by default observations.

    t is the longest episode. The padding repeats the last state, with action 0 and subgoal and segment -1. Elsewhere
    these are the current subgoal's index in the vocabulary, and its position in the task.
    """
    look = look or (lambda: env.observation)
    states, actions, segments, ended = [look()], [], [], []
    while not bool((stopped := env.terminated | env.truncated).all()):
        ended.append(stopped)
        segments.append(env.subgoals_done)
        chosen = act()
        actions.append(chosen.masked_fill(stopped.view(-1, *[1] * (chosen.dim() - 1)), 0))
        env.step(actions[-1])
        states.append(look())
    padding = torch.stack(ended, 1)
    done = torch.stack(segments, 1)
    return Trajectories(
        states=torch.stack(states, 1),
        actions=torch.stack(actions, 1),
        lengths=env.steps,
        subgoals=env.task_goals().gather(1, done).masked_fill(padding, -1),
        segments=done.masked_fill(padding, -1),
    )


def _check_tasks(board: Board, batch: int, tasks: Tensor, task_lengths: Tensor) -> None:
    if tasks.ndim != 2 or len(tasks) != batch or task_lengths.shape != (batch,):
        raise UserError(
            f"tasks have shape {tuple(tasks.shape)} and task_lengths {tuple(task_lengths.shape)}; expected "
            f"({batch}, longest task) and ({batch},), one task an episode."
        )
    if ((task_lengths < 0) | (task_lengths > tasks.shape[1])).any():
        raise UserError(f"a task length lies outside 0..{tasks.shape[1]}; count the colors of each task.")
    used = torch.arange(tasks.shape[1], device=tasks.device) < task_lengths[:, None]
    if (used & ((tasks < 0) | (tasks >= board.num_colors))).any():
        raise UserError(f"a task has an unknown color; colors run from 0 to {board.num_colors - 1}.")


def _check_subgoals(board: Board, subgoals: tuple[Task, ...]) -> None:
    if not subgoals or len({len(subgoal) for subgoal in subgoals}) > 1 or not subgoals[0]:
        raise UserError(f"subgoals are {subgoals}; give at least one, each of as many colors, and of one at least.")
    if not all(0 <= color < board.num_colors for subgoal in subgoals for color in subgoal):
        raise UserError(f"subgoals {subgoals} have an unknown color: colors run from 0 to {board.num_colors - 1}.")
