from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metacontroller.domains.gridworld_pinpad.expert import TIE_BREAKS, _ExpertPolicy, expert_trajectories
from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.domains.pinpad.layouts import UNREACHABLE, Layouts, distance_fields, sample_layouts
from metacontroller.domains.pinpad.tasks import TABLE_A1, TABLE_A2, pad_tasks

SMALL = PinpadConfig(size=5, num_colors=4, num_walls=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def path_length(config, objects, source, target_color):
    """Shortest path by networkx from a cell to a color, over empty cells; infinite when there is none."""
    graph = nx.grid_2d_graph(config.size, config.size)
    closed = set(objects) - {source, objects[target_color]}
    graph.remove_nodes_from([divmod(cell, config.size) for cell in closed])
    try:
        return nx.shortest_path_length(graph, divmod(source, config.size), divmod(objects[target_color], config.size))
    except nx.NetworkXNoPath:
        return float("inf")


def replay(config, trajectories, layouts, tasks):
    """The simulator after the recorded actions, and its tokens after each of them: (b, t, o + 1)."""
    padded, lengths = tasks
    batch = PinpadBatch(config, layouts, padded, lengths)
    tokens = []
    for actions in trajectories.actions.T:
        batch.step(actions)
        tokens.append(batch.observe_tokens())
    return batch, torch.stack(tokens, dim=1)


def layouts_of(config, trajectories):
    return Layouts(trajectories.states[:, 0, :-1], trajectories.states[:, 0, -1])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_distances_equal_networkx(seed):
    layouts = sample_layouts(SMALL, 2, generator(seed))
    fields = distance_fields(SMALL, layouts.objects, torch.tensor([[0, 3], [2, 1]]))
    for grid, colors in enumerate([(0, 3), (2, 1)]):
        objects = layouts.objects[grid].tolist()
        for place, color in enumerate(colors):
            for cell in set(range(25)) - set(objects[4:]):
                expected = path_length(SMALL, objects, cell, color)
                distance = int(fields[grid, place, cell])
                assert distance == expected or (distance >= UNREACHABLE and expected == float("inf"))


def test_distances_avoid_walls_and_other_colors(picture):
    config, layouts = picture("A10# .#.. .#.. ....")
    distances = distance_fields(config, layouts.objects, torch.tensor([[0]])).view(4, 4).tolist()
    far = UNREACHABLE
    assert [[min(value, far) for value in row] for row in distances] == [
        [8, 1, 0, far],
        [7, far, 1, 2],
        [6, far, 2, 3],
        [5, 4, 3, 4],
    ]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), tie_break=st.sampled_from(TIE_BREAKS))
def test_expert_paths_are_as_short_as_networkx_finds(seed, tie_break):
    task = (0, 2, 1, 0, 3)
    trajectories = expert_trajectories(SMALL, [task], 6, generator=generator(seed), tie_break=tie_break)
    for tokens, length in zip(trajectories.states[:, 0].tolist(), trajectories.lengths.tolist(), strict=True):
        *objects, cell = tokens
        total = 0
        for color in task:
            total += path_length(SMALL, objects, cell, color)
            cell = objects[color]
        assert length == total


@pytest.mark.parametrize(("table", "config"), [(TABLE_A1, PinpadConfig()), (TABLE_A2, SMALL)])
def test_replaying_the_actions_gives_the_states_and_success(table, config):
    trajectories = expert_trajectories(config, table, 40, generator=generator())
    walked = [tuple(task) for task in tasks_walked(trajectories)]
    assert set(walked) <= set(table)
    assert len(set(walked)) > 8  # sampled from the whole table
    batch, tokens = replay(config, trajectories, layouts_of(config, trajectories), pad_tasks(walked))
    assert torch.equal(tokens, trajectories.states[:, 1:])
    assert torch.equal(batch.colors_done, batch.task_lengths)
    assert torch.equal(batch.steps, trajectories.lengths)
    assert trajectories.steps == int(trajectories.lengths.max())


def expert(*arguments, **options):
    """`expert_trajectories`, after a look that the labels are there."""
    trajectories = expert_trajectories(*arguments, **options)
    assert trajectories.subgoals is not None
    assert trajectories.segments is not None
    return trajectories, trajectories.subgoals, trajectories.segments


def tasks_walked(trajectories):
    """The task of each episode, read off its labels."""
    for subgoals, segments in zip(trajectories.subgoals.tolist(), trajectories.segments.tolist(), strict=True):
        yield [subgoals[segments.index(place)] for place in range(max(segments) + 1)]


def test_labels_change_with_the_step_after_a_visit(picture):
    config, layouts = picture("A1. ... ..0")
    trajectories, subgoals, segments = expert(config, [(1, 0)], 1, layouts=layouts, tie_break="fixed")
    assert trajectories.lengths.tolist() == [4]
    assert segments.tolist() == [[0, 1, 1, 1]]
    assert subgoals.tolist() == [[1, 0, 0, 0]]
    assert trajectories.actions.tolist() == [[3, 1, 1, 3]]
    assert trajectories.states[0, :, -1].tolist() == [0, 1, 4, 7, 8]


def test_labels_of_pairs_are_those_of_their_colors_taken_together():
    tasks, pairs = [(2, 3, 0, 1), (0, 1)], ((0, 1), (2, 3))
    _, colors, places = expert(SMALL, tasks, 40, generator=generator())
    _, subgoals, segments = expert(SMALL, tasks, 40, generator=generator(), subgoals=pairs)
    real = colors >= 0
    assert torch.equal(subgoals[real], colors[real] // 2)
    assert torch.equal(segments[real], places[real] // 2)
    assert (subgoals[~real] == -1).all()
    assert (segments[~real] == -1).all()
    with pytest.raises(ValueError, match="task 0 has 1 colors, no multiple"):
        expert_trajectories(SMALL, [(0, 1), (0,)], 4, subgoals=pairs)


def test_padding_repeats_the_last_state():
    trajectories, subgoals, segments = expert(SMALL, [(0,), (0, 1, 2, 3)], 30, generator=generator(), epsilon=0.2)
    padding = ~trajectories.mask()
    assert padding.any()
    rows = torch.arange(30)
    last = trajectories.states[rows, trajectories.lengths]
    held = trajectories.states[:, 1:] == last[:, None]
    assert held.all(dim=2)[padding].all()
    assert (trajectories.actions[padding] == 0).all()
    assert (subgoals[padding] == -1).all()
    assert (segments[padding] == -1).all()
    assert (subgoals[~padding] >= 0).all()


def test_random_ties_are_uniform_over_the_optimal_moves(picture):
    config, layouts = picture("A.... ..... ..0.. ..... .....")
    actions = expert_trajectories(config, [(0,)], 2000, layouts=layouts.repeat(2000), generator=generator()).actions
    first, second = actions[:, 0], actions[:, 1]
    assert set(first.unique().tolist()) == {1, 3}
    assert (first == 1).float().mean() == pytest.approx(0.5, abs=0.06)  # five standard deviations
    assert (second[first == 1] == 1).float().mean() == pytest.approx(0.5, abs=0.08)


def test_fixed_ties_take_the_first_action(picture):
    config, layouts = picture("..... ..... ..0.. ..... A....")
    trajectories = expert_trajectories(config, [(0,)], 3, layouts=layouts.repeat(3), tie_break="fixed")
    assert trajectories.actions.tolist() == [[0, 0, 3, 3]] * 3


def test_without_lots_the_layout_decides_the_path():
    layouts = sample_layouts(SMALL, 20, generator())
    first, again = (
        expert_trajectories(SMALL, [(0, 1, 2)], 20, layouts=layouts, tie_break="fixed", generator=generator(seed))
        for seed in (1, 2)
    )
    assert torch.equal(first.actions, again.actions)
    lots = expert_trajectories(SMALL, [(0, 1, 2)], 20, layouts=layouts, generator=generator(1))
    assert torch.equal(first.lengths, lots.lengths)
    assert not torch.equal(first.actions, lots.actions)


def test_epsilon_moves_never_enter_a_wrong_color():
    config = PinpadConfig(size=4, num_colors=4, num_walls=2, max_steps=40)
    task = (0, 3, 1)
    trajectories = expert_trajectories(config, [task], 300, epsilon=0.7, generator=generator())
    batch, tokens = replay(config, trajectories, layouts_of(config, trajectories), pad_tasks([task] * 300))
    assert torch.equal(tokens, trajectories.states[:, 1:])
    solved = batch.colors_done == 3
    assert torch.equal(solved, batch.terminated)
    assert (trajectories.lengths[~solved] == 40).all()
    assert 0 < int(solved.sum()) < 300


@pytest.mark.parametrize("tie_break", TIE_BREAKS)
def test_epsilon_is_the_share_of_random_moves(picture, tie_break):
    # Up leads off the grid and left into a wall: both change nothing. Right enters a wrong color. Down is the way.
    config, layouts = picture("#A1. .... .... .0..")
    actions = expert_trajectories(
        config, [(0,)], 3000, layouts=layouts.repeat(3000), epsilon=0.3, tie_break=tie_break, generator=generator()
    ).actions
    shares = torch.bincount(actions[:, 0], minlength=4) / 3000
    assert shares.tolist() == pytest.approx([0.1, 0.8, 0.1, 0.0], abs=0.04)
    assert shares[3] == 0


def test_epsilon_moves_stay_out_of_pockets(picture):
    # To the right of color 1 lies a pocket from which color 0 cannot be reached.
    config, layouts = picture("A.1. ..## .... 0...")
    trajectories = expert_trajectories(
        config, [(1, 0)], 200, layouts=layouts.repeat(200), epsilon=0.5, generator=generator()
    )
    assert (trajectories.states[:, :, -1] == 2).any(dim=1).all()
    assert not (trajectories.states[:, :, -1] == 3).any()


def test_the_same_seed_gives_the_same_episodes():
    first, second, other = (
        expert_trajectories(SMALL, TABLE_A2, 8, generator=generator(seed), epsilon=0.1) for seed in (3, 3, 4)
    )
    assert torch.equal(first.states, second.states)
    assert torch.equal(first.actions, second.actions)
    assert not torch.equal(first.states[:, 0], other.states[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [(0, 9)]}, "unknown color 9"),
        ({"n": 0}, "n is 0"),
        ({"tie_break": "first"}, "tie_break is 'first'"),
        ({"epsilon": 1.5}, "epsilon is 1.5"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"n": 2}, "1 layouts were given for 2 episodes"),
    ],
)
def test_bad_arguments_are_named(picture, changes, message):
    config, layouts = picture("A0. ... ..1")
    arguments = {"tasks": [(0, 1)], "n": 1, "layouts": layouts} | changes
    with pytest.raises(ValueError, match=message):
        expert_trajectories(config, **arguments)


def test_an_infeasible_layout_is_rejected(picture):
    config, layouts = picture("A.. .## .#0")
    with pytest.raises(ValueError, match="layout 0 is infeasible"):
        expert_trajectories(config, [(0,)], 1, layouts=layouts)


def test_a_deviating_expert_may_stay_on_a_color_that_it_has_visited():
    """In the corner, on color 0: two of the four moves lead nowhere, which visits nothing and ends nothing."""
    config, rows = PinpadConfig(size=3, num_colors=2, num_walls=0), 400
    layouts = Layouts(torch.tensor([[0, 8]]), torch.tensor([1])).repeat(rows)
    batch = PinpadBatch(config, layouts, torch.tensor([[0, 1]]).expand(rows, -1), torch.full((rows,), 2))
    batch.step(torch.full((rows,), 2))  # left, onto color 0
    moves = _ExpertPolicy(batch, "random", 1.0, generator()).act()
    assert set(moves.tolist()) == {0, 1, 2, 3}
    batch.step(moves)
    assert not bool(batch.terminated.any())
