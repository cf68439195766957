"""Tasks of the pinpad worlds: ordered lists of colors to visit, and the paper's tables A1 and A2 as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor
from tyro.constructors import PrimitiveConstructorSpec

from metacontroller.errors import UserError
from metacontroller.ranges import Count, check


def parse_task(text: str) -> tuple[int, ...]:
    """Parse a task: ``"0-1-2-3"`` gives ``(0, 1, 2, 3)``. UserError for anything else."""
    parts = text.strip().split("-")
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"task {text!r} is not a list of colors: write color numbers joined by '-', such as '0-1-2-3'.")
    return tuple(int(part) for part in parts)


def format_task(task: Sequence[int]) -> str:
    """Write a task as its colors joined by dashes, the inverse of `parse_task`."""
    return "-".join(str(color) for color in task)


Task = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TASK",
        instance_from_str=lambda words: parse_task(words[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda task: [format_task(task)],
    ),
]
"""Colors to visit in order; a field of this type is written 0-1-2-3 on the command line."""


_A1 = """
0-1-4-5-0-1 0-1-4-5-2-3 0-1-6-7-2-3 2-3-0-1-4-5 2-3-6-7-2-3 2-3-6-7-4-5 4-5-0-1-4-5 4-5-0-1-6-7
4-5-2-3-6-7 6-7-2-3-0-1 6-7-2-3-6-7 6-7-4-5-0-1 0-1-6-7-4-5 2-3-0-1-6-7 4-5-2-3-0-1 6-7-4-5-2-3
"""
_A2 = "0-3-2 1-0-3 2-1-0 3-2-1 0-2-0 0-2-1 0-3-1 1-0-2 1-3-1 1-3-2 2-0-2 2-0-3 2-1-3 3-1-0 3-1-3 3-2-0"

TABLE_A1: tuple[Task, ...] = tuple(map(parse_task, _A1.split()))
"""Pretraining tasks of the grid (table A1): 8 colors; the subgoals are the pairs 0-1, 2-3, 4-5 and 6-7."""

TABLE_A2: tuple[Task, ...] = tuple(map(parse_task, _A2.split()))
"""Pretraining tasks of the ant (table A2): 4 colors; each color is a subgoal."""

A1_POST: Task = parse_task("0-1-2-3-4-5-6-7-0-1-2-3")
"""Post-training task for `TABLE_A1`: none of its transitions between subgoals (pairs) occurs there."""

A2_POST: Task = parse_task("0-1-2-3")
"""Post-training task for `TABLE_A2`: none of its transitions occurs there."""

TABLES = {"A1": TABLE_A1, "A2": TABLE_A2}


def read_tasks(tasks: str | Iterable[str | Sequence[int]]) -> tuple[Task, ...]:
    """Return the tasks of a table, "A1" or "A2", or of a list, each as text or as colors; UserError if unknown."""
    if isinstance(tasks, str):
        if tasks not in TABLES:
            raise UserError(f"task table {tasks!r} is unknown: choose one of {', '.join(TABLES)}, or list the tasks.")
        return TABLES[tasks]
    return tuple(parse_task(task) if isinstance(task, str) else tuple(task) for task in tasks)


def check_tasks(tasks: Iterable[Sequence[int]], num_colors: int, remedy: str = "raise num_colors") -> None:
    """UserError unless there are tasks, each of known colors and without immediate repeats. remedy: besides another
    task, what would make an unknown color known."""
    tasks = list(tasks)
    if not tasks:
        raise UserError("the list of tasks is empty: give at least one task, such as (0, 1, 2).")
    for task in tasks:
        if len(task) == 0:
            raise UserError("an empty task has nothing to visit: give each task at least one color.")
        for color in task:
            check("a color of a task", color, int)
            if not 0 <= color < num_colors:
                raise UserError(
                    f"task {format_task(task)} has unknown color {color}: colors run from 0 to {num_colors - 1}, "
                    f"so change the task or {remedy}."
                )
        for color, following in pairwise(task):
            if color == following:
                raise UserError(
                    f"task {format_task(task)} names color {color} twice in a row: a visit is a move onto the color "
                    "from elsewhere, so put another color between."
                )


def subgoal_chunks(task: Sequence[int], colors_per_subgoal: int) -> tuple[Task, ...]:
    """Return the subgoals of a task, in order: its colors in chunks of ``colors_per_subgoal``.

    UserError if the length of the task is not a multiple of ``colors_per_subgoal``.
    """
    check("colors_per_subgoal", colors_per_subgoal, Count)
    if len(task) % colors_per_subgoal:
        raise UserError(
            f"task {format_task(task)} has {len(task)} colors, no multiple of colors_per_subgoal {colors_per_subgoal}: "
            "change the task or colors_per_subgoal."
        )
    return tuple(tuple(task[i : i + colors_per_subgoal]) for i in range(0, len(task), colors_per_subgoal))


def subgoal_vocabulary(tasks: Iterable[Sequence[int]], colors_per_subgoal: int, num_colors: int) -> tuple[Task, ...]:
    """Return the subgoals that tasks consist of, each as its colors; a subgoal's index is its position in this tuple.

    For subgoals of one color these are all colors of the grid, in order. For larger ones they are the distinct chunks
    of the tasks, sorted. `format_task` gives a subgoal's name, such as "0-1". UserError if the length of a task is not
    a multiple of ``colors_per_subgoal``.
    """
    chunks = {chunk for task in tasks for chunk in subgoal_chunks(task, colors_per_subgoal)}
    return single_colors(num_colors) if colors_per_subgoal == 1 else tuple(sorted(chunks))


def single_colors(num_colors: int) -> tuple[Task, ...]:
    """Return the vocabulary in which each color of the grid is a subgoal."""
    return tuple((color,) for color in range(num_colors))


def subgoal_indices(task: Sequence[int], vocabulary: Sequence[Task]) -> tuple[int, ...]:
    """Return a task as the indices of its subgoals in the vocabulary; UserError if it lacks one."""
    chunks = subgoal_chunks(task, len(vocabulary[0]))
    unknown = [chunk for chunk in chunks if chunk not in vocabulary]
    if unknown:
        raise UserError(
            f"task {format_task(task)} has subgoal {format_task(unknown[0])}, which is not among "
            f"{', '.join(map(format_task, vocabulary))}: change the task or the vocabulary."
        )
    return tuple(map(vocabulary.index, chunks))


def transitions(tasks: Iterable[Sequence[int]]) -> set[tuple[int, int]]:
    """Return the pairs of consecutive entries in the tasks: colors, or subgoals for tasks from `subgoal_indices`."""
    return {pair for task in tasks for pair in pairwise(task)}


def color_shifts(tasks: Iterable[Sequence[int]], num_colors: int) -> tuple[int, ...]:
    """Return the numbers k, 0 first, by which all colors can be counted on, c to c + k modulo num_colors, so that the
    tasks stay the same ones: 0, 1, 2 and 3 for `TABLE_A2`."""
    tasks = sorted(map(tuple, tasks))
    shifted = [sorted(tuple((color + k) % num_colors for color in task) for task in tasks) for k in range(num_colors)]
    return tuple(k for k in range(num_colors) if shifted[k] == tasks)


def pad_tasks(tasks: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Stack n tasks into int64 (n, longest), padded with -1, and return their lengths, int64 (n,)."""
    longest = max(len(task) for task in tasks)
    padded = [[*task, *[-1] * (longest - len(task))] for task in tasks]
    lengths = torch.tensor([len(task) for task in tasks], device=device)
    return torch.tensor(padded, dtype=torch.int64, device=device), lengths
