from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metacontroller.domains.gridworld_pinpad.layouts import PinpadConfig, random_symmetry, tokens_to_onehot
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch, check_actions
from metacontroller.domains.pinpad.layouts import Layouts, feasible, sample_layouts
from metacontroller.domains.pinpad.tasks import pad_tasks

UP, DOWN, LEFT, RIGHT = range(4)


def play(batch, actions):
    """Reward of each step, every grid doing the same actions: (steps, b)."""
    return torch.stack([batch.step(torch.full((len(batch),), action)) for action in actions])


@pytest.mark.parametrize(("action", "cell"), [(UP, 1), (DOWN, 7), (LEFT, 3), (RIGHT, 5)])
def test_each_action_moves_one_cell(start, action, cell):
    batch = start("... .A. ..0", (0,))
    assert play(batch, [action]).tolist() == [[0.0]]
    assert batch.agent.tolist() == [cell]


@pytest.mark.parametrize("corner", ["A.. ... ..0", "..A ... 0..", "..0 ... A..", "0.. ... ..A"])
def test_moves_off_the_grid_change_nothing(start, corner):
    batch = start(corner, (0,))
    cell = int(batch.agent)
    off = [DOWN if cell > 5 else UP, RIGHT if cell % 3 == 2 else LEFT]
    for action in off:
        play(batch, [action])
        assert batch.agent.tolist() == [cell]
    assert batch.steps.tolist() == [2]


@pytest.mark.parametrize("action", [UP, DOWN, LEFT, RIGHT])
def test_moves_into_walls_change_nothing(start, action):
    batch = start(".#.0 #A#. .#.. ....", (0,))
    play(batch, [action])
    assert batch.agent.tolist() == [5]
    assert batch.steps.tolist() == [1]


def test_reward_comes_only_with_the_last_color(start):
    batch = start("A01 ... ...", (0, 1))
    assert play(batch, [RIGHT]).tolist() == [[0.0]]
    assert (batch.colors_done.tolist(), batch.visited_color().tolist()) == ([1], [0])
    assert batch.next_color().tolist() == [1]
    assert not batch.terminated.any()
    assert play(batch, [RIGHT]).tolist() == [[1.0]]
    assert (batch.colors_done.tolist(), batch.visited_color().tolist()) == ([2], [1])
    assert batch.next_color().tolist() == [-1]
    assert batch.terminated.all()
    assert not batch.truncated.any()


def test_a_wrong_color_terminates_without_reward(start):
    batch = start("A10 ... ...", (0, 1))
    assert play(batch, [RIGHT]).tolist() == [[0.0]]
    assert batch.terminated.all()
    assert (batch.colors_done.tolist(), batch.visited_color().tolist()) == ([0], [1])


def test_a_no_op_on_a_color_is_no_visit(start):
    batch = start("A0. ..1 ...", (0, 1))
    play(batch, [RIGHT, UP])
    assert (batch.colors_done.tolist(), batch.visited_color().tolist()) == ([1], [-1])
    assert not batch.terminated.any()


def test_coming_back_to_a_color_is_a_visit(start):
    batch = start("A0. ..1 ...", (0, 1))
    play(batch, [RIGHT, RIGHT, LEFT])
    assert batch.visited_color().tolist() == [0]
    assert batch.terminated.all()
    again = start("A0. ..1 ...", (0, 1, 0))
    assert play(again, [RIGHT, RIGHT, DOWN, UP, LEFT]).squeeze(1).tolist() == [0, 0, 0, 0, 1]


def test_truncation_after_max_steps(start):
    batch = start("A.. ... ..0", (0,), max_steps=3)
    play(batch, [UP, UP])
    assert not batch.truncated.any()
    play(batch, [UP])
    assert batch.truncated.all()
    assert not batch.terminated.any()


def test_success_on_the_last_step_is_no_truncation(start):
    batch = start("A0. ... ...", (0,), max_steps=1)
    assert play(batch, [RIGHT]).tolist() == [[1.0]]
    assert batch.terminated.all()
    assert not batch.truncated.any()


@pytest.mark.parametrize(("task", "max_steps"), [((0,), 9), ((1, 0), 9), ((0, 1), 1)])
def test_an_ended_grid_stays_as_it_is(start, task, max_steps):
    batch = start("A0. ..1 ...", task, max_steps=max_steps)
    play(batch, [RIGHT])
    assert (batch.terminated | batch.truncated).all()
    before = [batch.agent, batch.colors_done, batch.steps, batch.terminated, batch.truncated]
    assert play(batch, [RIGHT, DOWN, LEFT]).sum() == 0
    assert batch.visited_color().tolist() == [-1]
    after = [batch.agent, batch.colors_done, batch.steps, batch.terminated, batch.truncated]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_grids_of_a_batch_are_independent(start):
    batch = start("A0. ..1 ...", (0, 1), copies=3)
    rewards = [batch.step(torch.tensor(actions)) for actions in ([RIGHT, DOWN, LEFT], [RIGHT, RIGHT, RIGHT])]
    assert torch.stack(rewards).sum() == 0
    assert batch.agent.tolist() == [2, 4, 1]
    assert batch.colors_done.tolist() == [1, 0, 1]
    assert batch.step(torch.tensor([DOWN, RIGHT, UP])).tolist() == [1.0, 0.0, 0.0]
    assert batch.terminated.tolist() == [True, True, False]


# A 0 1    Colors 0 and 1 make one subgoal, 2 and 3 the other.
# . 3 2
# . . .
PAIRED = "A01 .32 ..."
PAIRS = ((0, 1), (2, 3))


def paired(picture, task, copies=1):
    config, layouts = picture(PAIRED)
    tasks, lengths = pad_tasks([task] * copies)
    return PinpadBatch(config, layouts.repeat(copies), tasks, lengths, subgoals=PAIRS)


def test_a_task_of_two_pairs_step_by_step(picture):
    batch = paired(picture, (0, 1, 2, 3))
    told = [(batch.goal().item(), batch.subgoals_done.item(), batch.reached().item(), batch.success.item())]
    for action in (RIGHT, RIGHT, UP, DOWN, LEFT):
        play(batch, [action])
        told.append((batch.goal().item(), batch.subgoals_done.item(), batch.reached().item(), batch.success.item()))
    assert told == [
        (0, 0, -1, False),
        (0, 0, -1, False),  # color 0
        (1, 1, 0, False),  # color 1: the first pair
        (1, 1, -1, False),  # no move, no visit
        (1, 1, -1, False),  # color 2
        (-1, 2, 1, True),  # color 3: the second pair
    ]


def test_pairs_are_reached_in_walks_without_a_task_too(picture):
    batch = paired(picture, (0,), copies=2)
    reached = []
    for action in (DOWN, RIGHT, UP, RIGHT, LEFT, DOWN, RIGHT, LEFT, LEFT, UP, RIGHT, RIGHT):
        play(batch, [action])
        batch.terminated = torch.zeros_like(batch.terminated)
        reached.append(batch.reached().tolist())
        batch.select(torch.arange(len(batch)))
    # visits 3, 0, 1, 0, 3, 2, 3, then over two empty cells 0, 1
    expected = [-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 0]
    assert reached == [[index, index] for index in expected]


def test_recent_visits_follow_their_grid_and_leave_with_it(picture):
    batch = paired(picture, (0, 1, 2, 3), copies=3)
    play(batch, [RIGHT])
    batch.step(torch.tensor([RIGHT, DOWN, LEFT]))  # to colors 1, 3, and back to the start
    batch.select(torch.tensor([2, 0]))
    assert batch.reached().tolist() == [-1, 0]
    batch.replace(torch.tensor([1]), paired(picture, (0, 1, 2, 3)))
    batch.step(torch.tensor([DOWN, RIGHT]))
    batch.step(torch.tensor([UP, RIGHT]))
    assert batch.reached().tolist() == [-1, 0]
    config, layouts = picture(PAIRED)
    with pytest.raises(ValueError, match="the new episodes have subgoals"):
        batch.replace(torch.tensor([1]), PinpadBatch(config, layouts, *pad_tasks([(0, 1, 2, 3)])))


def test_a_subgoal_that_is_not_in_the_vocabulary_has_no_index(picture):
    batch = paired(picture, (0, 3, 2, 3))
    assert batch.task_goals().tolist() == [[-1, 1, -1]]
    assert batch.goal().tolist() == [-1]
    play(batch, [RIGHT, DOWN])
    assert (batch.goal().tolist(), batch.reached().tolist(), batch.subgoals_done.tolist()) == ([1], [-1], [1])


def test_with_single_colors_goals_are_the_colors_themselves():
    config, generator = PinpadConfig(size=4, num_colors=3, num_walls=1, max_steps=30), torch.Generator().manual_seed(0)
    tasks, lengths = pad_tasks([(0, 1, 2), (2, 0), (1,)] * 40)
    batch = PinpadBatch(config, sample_layouts(config, 120, generator), tasks, lengths)
    for _ in range(30):
        batch.step(torch.randint(4, (120,), generator=generator))
        assert torch.equal(batch.goal(), batch.next_color())
        assert torch.equal(batch.reached(), batch.visited_color())
        assert torch.equal(batch.subgoals_done, batch.colors_done)
    assert batch.success.any()
    assert torch.equal(batch.success, batch.terminated & (batch.colors_done == lengths))


@pytest.mark.parametrize(
    ("subgoals", "message"),
    [
        ((), "give at least one"),
        (((0, 1), (2,)), "each of as many colors"),
        (((0, 9),), "unknown color: colors run from 0 to 3"),
    ],
)
def test_bad_subgoals_are_refused(picture, subgoals, message):
    config, layouts = picture(PAIRED)
    with pytest.raises(ValueError, match=message):
        PinpadBatch(config, layouts, *pad_tasks([(0, 1)]), subgoals=subgoals)


def test_tokens_are_the_cells_of_objects_and_agent(start):
    batch = start("1#. A.0 ...", (0,))
    assert batch.observe_tokens().tolist() == [[5, 0, 1, 3]]
    play(batch, [RIGHT])
    assert batch.observe_tokens().tolist() == [[5, 0, 1, 4]]


def test_compact_keeps_the_named_grids(start):
    batch = start("A0. ..1 ...", (0, 1), copies=3)
    batch.step(torch.tensor([RIGHT, DOWN, UP]))
    batch.select(torch.tensor([2, 0]))
    assert batch.agent.tolist() == [0, 1]
    assert batch.step(torch.tensor([DOWN, RIGHT])).shape == (2,)
    assert batch.agent.tolist() == [3, 2]
    assert batch.colors_done.tolist() == [0, 1]
    assert batch.observe_tokens().shape == (2, 3)


def test_replace_puts_fresh_grids_in_ended_rows(start):
    batch = start("A0. ..1 ...", (0, 1), copies=3)
    batch.step(torch.tensor([RIGHT, DOWN, UP]))
    batch.replace(torch.tensor([0]), start("0A. ..1 ...", (1, 0)))
    assert batch.agent.tolist() == [1, 3, 0]
    assert batch.steps.tolist() == [0, 1, 1]
    batch.step(torch.tensor([LEFT, UP, RIGHT]))
    assert batch.visited_color().tolist() == [0, -1, 0]
    assert batch.terminated.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="padded to this batch's width"):
        batch.replace(torch.tensor([0]), start("0A. ..1 ...", (1, 0, 1)))


def test_onehot_has_one_block_per_object_then_the_agent():
    config = PinpadConfig(size=3, num_colors=2, num_walls=1)
    vector = tokens_to_onehot(config, torch.tensor([[[5, 0, 1, 3]]]))
    assert vector.shape == (1, 1, config.observation_size)
    assert config.observation_size == 36
    assert vector.dtype == torch.float32
    assert vector.flatten().nonzero().flatten().tolist() == [5, 9 + 0, 18 + 1, 27 + 3]
    assert vector.sum() == 4
    with pytest.raises(ValueError, match="expected 4 in the last axis"):
        tokens_to_onehot(config, torch.zeros(2, 3, dtype=torch.int64))


def test_paper_configuration():
    config = PinpadConfig()
    assert (config.size, config.num_colors, config.num_walls, config.max_steps) == (7, 8, 4, 100)
    assert config.observation_size == 637


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 1, "num_colors": 1, "num_walls": 0}, "size is 1"),
        ({"num_colors": 0}, "num_colors is 0"),
        ({"num_walls": -1}, "num_walls is -1"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"size": 3, "num_colors": 8, "num_walls": 1}, "9 cells, too few"),
    ],
)
def test_an_impossible_grid_is_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        PinpadConfig(**values)


def test_a_grid_may_be_exactly_full():
    assert PinpadConfig(size=3, num_colors=8, num_walls=0).num_objects == 8


@pytest.mark.parametrize(
    ("drawing", "expected"),
    [
        ("A.. .0. ..1", True),
        ("A#1 ##. 0..", False),  # the start is shut in
        ("A.. .## .#0", False),  # one color is shut in
        ("A1. .#. .#0", False),  # only a way over color 1 leads to color 0
        ("A.0 ..1 ...", True),
        ("A01 ..# ...", False),  # color 1 touches color 0, a wall and nothing else
    ],
)
def test_feasible_means_every_color_over_empty_cells(picture, drawing, expected):
    config, layouts = picture(drawing)
    assert feasible(config, layouts).tolist() == [expected]


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(3, 7), num_colors=st.integers(1, 4), num_walls=st.integers(0, 3), seed=st.integers(0, 2**31 - 1)
)
def test_sampled_layouts_are_feasible_and_do_not_overlap(size, num_colors, num_walls, seed):
    if size * size < 2 * (num_colors + num_walls):
        size = 5
    config = PinpadConfig(size=size, num_colors=num_colors, num_walls=num_walls)
    layouts = sample_layouts(config, 20, torch.Generator().manual_seed(seed))
    cells = torch.cat([layouts.objects, layouts.agent[:, None]], dim=1)
    assert ((cells >= 0) & (cells < config.num_cells)).all()
    assert all(len(set(row)) == config.num_objects + 1 for row in cells.tolist())
    assert feasible(config, layouts).all()


def test_layouts_are_uniform_over_the_cells():
    config = PinpadConfig(size=5, num_colors=1, num_walls=0)
    layouts = sample_layouts(config, 5000, torch.Generator().manual_seed(0))
    for cells in (layouts.objects[:, 0], layouts.agent):
        counts = torch.bincount(cells, minlength=25)
        assert (counts - 200).abs().max() < 70  # five standard deviations


def test_layouts_follow_the_seed():
    config = PinpadConfig()
    first, second, other = (sample_layouts(config, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.objects, second.objects)
    assert torch.equal(first.agent, second.agent)
    assert not torch.equal(first.objects, other.objects)


def test_a_configuration_without_feasible_layouts_is_an_error():
    with pytest.raises(ValueError, match="no feasible layout"):
        sample_layouts(PinpadConfig(size=2, num_colors=3, num_walls=0), 1)


def test_layouts_repeat():
    layouts = Layouts(torch.tensor([[0, 1], [2, 3]]), torch.tensor([4, 5]))
    assert layouts.repeat(2).agent.tolist() == [4, 4, 5, 5]
    assert layouts.repeat(2).objects.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert len(layouts) == 2


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_random_play_keeps_the_invariants(seed):
    generator = torch.Generator().manual_seed(seed)
    config = PinpadConfig(size=5, num_colors=3, num_walls=3, max_steps=20)
    tasks, lengths = pad_tasks([(0, 1), (2,)] * 8)
    batch = PinpadBatch(config, sample_layouts(config, 16, generator), tasks, lengths)
    total = torch.zeros(16)
    walls = batch.objects[:, config.num_colors :]
    for _ in range(25):
        before = batch.agent
        total += batch.step(torch.randint(4, (16,), generator=generator))
        distance = (before // 5 - batch.agent // 5).abs() + (before % 5 - batch.agent % 5).abs()
        assert (distance <= 1).all()
        assert not (batch.agent[:, None] == walls).any()
        assert not (batch.terminated & batch.truncated).any()
    assert (batch.terminated | batch.truncated).all()
    assert torch.equal(total == 1, batch.terminated & (batch.colors_done == lengths))
    assert (batch.steps[batch.truncated] == 20).all()


def good_arguments():
    config = PinpadConfig(size=3, num_colors=2, num_walls=0)
    layouts = Layouts(torch.tensor([[0, 1]]), torch.tensor([8]))
    return config, layouts, torch.tensor([[0, 1]]), torch.tensor([2])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, Layouts(torch.tensor([[0, 1, 2]]), torch.tensor([8])), "expected \\(batch, 2\\)"),
        (1, Layouts(torch.tensor([[0, 1]]), torch.tensor([9])), "cell off the grid"),
        (1, Layouts(torch.tensor([[0, 1]]), torch.tensor([1])), "two things in one cell"),
        (2, torch.tensor([0, 1]), "one task an episode"),
        (2, torch.tensor([[0, 2]]), "unknown color"),
        (2, torch.tensor([[0, -1]]), "unknown color"),
        (3, torch.tensor([3]), "lies outside 0..2"),
        (3, torch.tensor([2, 2]), "one task an episode"),
    ],
)
def test_a_batch_rejects_what_does_not_fit(place, value, message):
    arguments: list[Any] = list(good_arguments())
    PinpadBatch(*arguments)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        PinpadBatch(*arguments)


def test_actions_are_checked(start):
    with pytest.raises(ValueError, match="expected one per grid"):
        start("A0 ..", (0,)).step(torch.tensor([0, 1]))
    check_actions(torch.tensor([0, 3]), 2)
    with pytest.raises(ValueError, match="action 4 is out of range"):
        check_actions(torch.tensor([0, 4]), 2)
    with pytest.raises(ValueError, match="action -1 is out of range"):
        check_actions(torch.tensor([-1]), 1)
    with pytest.raises(ValueError, match="integers"):
        check_actions(torch.tensor([0.0]), 1)


def test_turning_keeps_distances_and_colors_and_draws_all_eight_symmetries():
    config = PinpadConfig(size=5, num_colors=3, num_walls=2)
    layouts = sample_layouts(config, 1, torch.Generator().manual_seed(0)).repeat(400)
    tokens = torch.cat([layouts.objects, layouts.agent[:, None]], 1)[:, None].repeat(1, 3, 1)
    turned = random_symmetry(5, tokens, torch.Generator().manual_seed(1))
    assert torch.equal(turned, turned[:, :1].expand_as(turned))  # one symmetry an episode, not one a step
    assert len(turned[:, 0].unique(dim=0)) == 8

    def distances(cells):
        row, column = cells // 5, cells % 5
        return (row[..., :, None] - row[..., None, :]).square() + (column[..., :, None] - column[..., None, :]).square()

    assert torch.equal(distances(turned), distances(tokens))
