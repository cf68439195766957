"""The expert of gridworld-pinpad: episodes that follow exact shortest paths.

Axes: b grid of the batch, t time, o object, a action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, move_table
from metacontroller.domains.gridworld_pinpad.simulator import NUM_ACTIONS, PinpadBatch
from metacontroller.domains.pinpad.episodes import record
from metacontroller.domains.pinpad.layouts import (
    UNREACHABLE,
    Layouts,
    check_layouts,
    distance_fields,
    feasible,
    object_lookup,
    sample_layouts,
)
from metacontroller.domains.pinpad.tasks import Task, check_tasks, pad_tasks, subgoal_chunks
from metacontroller.errors import UserError
from metacontroller.ranges import Count, Probability, check

TieBreak = Literal["random", "fixed"]
"""How the expert chooses among the first moves of shortest paths, see `expert_trajectories`."""

TIE_BREAKS: tuple[str, ...] = get_args(TieBreak)


def expert_trajectories(
    config: PinpadConfig,
    tasks: Sequence[Sequence[int]],
    n: int,
    *,
    generator: torch.Generator | None = None,
    tie_break: str = "random",
    epsilon: float = 0.0,
    layouts: Layouts | None = None,
    subgoals: Sequence[Task] | None = None,
    device: torch.device | str = "cpu",
) -> Trajectories:
    """Return n episodes of the expert, each with a random layout and a task sampled uniformly from the given ones.

    Args:
        config: the grid's configuration.
        tasks: the tasks to sample from.
        n: number of episodes.
        generator: source of all randomness; on `device`.
        tie_break: "random" samples uniformly among the first moves of shortest paths, the paper's stochastic
            shortest-path expert; "fixed" always takes the first of them in the order up, down, left, right.
        epsilon: probability that a move is instead sampled uniformly from those that neither enter a wrong color nor
            lead to a cell from which the next color cannot be reached; moves that change nothing are among them.
        layouts: n layouts to use instead of random ones.
        subgoals: the vocabulary that labels refer to, see `subgoal_vocabulary`; by default every color of the grid.
        device: where to simulate; ignored when layouts are given, which stay where they are.

    Returns:
        Episodes as of `record`: states are tokens, int64 (b, t + 1, o + 1), the cells of the objects and of the agent.

    Raises:
        UserError: for an invalid task, n, tie_break or epsilon, or for layouts that are infeasible or not n.
    """
    check_tasks(tasks, config.num_colors)
    check("n", n, Count)
    check("tie_break", tie_break, TieBreak)
    check("epsilon", epsilon, Probability)
    if subgoals:
        _ = [subgoal_chunks(task, len(subgoals[0])) for task in tasks]  # raises for tasks of no whole subgoals
    if layouts is None:
        layouts = sample_layouts(config, n, generator, device)
    else:
        _check_feasible(config, layouts, n)
    device = layouts.agent.device
    padded, lengths = pad_tasks(tasks, device)
    chosen = torch.randint(len(tasks), (n,), generator=generator, device=device)
    batch = PinpadBatch(config, layouts, padded[chosen], lengths[chosen], subgoals=subgoals)
    policy = _ExpertPolicy(batch, tie_break, epsilon, generator)
    walks = record(batch, policy.act, look=lambda: batch.agent[:, None])  # the objects stay: put beside them at the end
    objects = batch.objects[:, None].expand(-1, walks.steps + 1, -1)
    return replace(walks, states=torch.cat([objects, walks.states], dim=2))


class _ExpertPolicy:
    """Chooses the expert's moves in a batch of grids from the distances to every color."""

    def __init__(self, batch: PinpadBatch, tie_break: str, epsilon: float, generator: torch.Generator | None) -> None:
        board, device = batch.board, batch.agent.device
        self.batch = batch
        self.random_ties = tie_break == "random"
        self.epsilon = epsilon
        self.generator = generator
        colors = torch.arange(board.num_colors, device=device).expand(len(batch), -1)
        self.distances = distance_fields(board, batch.objects, colors).flatten(1)
        self.lookup = object_lookup(board, batch.objects)
        self.moves = move_table(board.size, device).T.contiguous()
        self.fixed_preference = torch.arange(NUM_ACTIONS, 0, -1, device=device) / NUM_ACTIONS

    def act(self) -> Tensor:
        """Return int64 (b,): one move per grid, arbitrary where the episode has ended."""
        batch, board = self.batch, self.batch.board
        # Only grids that have ended have no next color (-1); any color will do there.
        target = batch.next_color().clamp(min=0)[:, None]
        here, num_colors = batch.agent[:, None], board.num_colors
        ahead = self.moves[batch.agent]
        objects = self.lookup.gather(1, ahead)
        ahead = torch.where(objects >= num_colors, here, ahead)
        # Cells of other colors have distances too, since paths may start there, but may not be entered.
        wrong = (objects >= 0) & (objects < num_colors) & (objects != target) & (ahead != here)
        distance = self.distances.gather(1, target * board.num_cells + ahead).masked_fill(wrong, UNREACHABLE)
        allowed = distance == distance.amin(dim=1, keepdim=True)
        if not self.random_ties and self.epsilon == 0:
            return (allowed * self.fixed_preference).argmax(dim=1)
        preference = torch.rand(ahead.shape, generator=self.generator, device=ahead.device)
        if self.epsilon > 0:
            deviates = torch.rand((len(batch), 1), generator=self.generator, device=ahead.device) < self.epsilon
            allowed = torch.where(deviates, distance < UNREACHABLE, allowed)
        else:
            deviates = torch.zeros_like(allowed[:, :1])
        if not self.random_ties:
            preference = torch.where(deviates, preference, self.fixed_preference)
        return torch.where(allowed, preference, -1.0).argmax(dim=1)


def _check_feasible(config: PinpadConfig, layouts: Layouts, n: int) -> None:
    if len(layouts) != n:
        raise UserError(f"{len(layouts)} layouts were given for {n} episodes; give one layout per episode.")
    check_layouts(config, layouts)
    infeasible = (~feasible(config, layouts)).nonzero()
    if len(infeasible):
        raise UserError(
            f"layout {int(infeasible[0])} is infeasible: some color cannot be reached over empty cells, so use layouts "
            "from sample_layouts or move a wall."
        )
