from __future__ import annotations

import pytest

from metacontroller.domains.pinpad.tasks import (
    A1_POST,
    A2_POST,
    TABLE_A1,
    TABLE_A2,
    check_tasks,
    color_shifts,
    format_task,
    pad_tasks,
    parse_task,
    read_tasks,
    subgoal_chunks,
    subgoal_indices,
    subgoal_vocabulary,
    transitions,
)


def subgoal_transitions(tasks, colors_per_subgoal):
    """Transitions between subgoals, each a run of as many colors."""
    step = colors_per_subgoal
    return {
        (task[i : i + step], task[i + step : i + 2 * step]) for task in tasks for i in range(0, len(task) - step, step)
    }


def test_tables_have_sixteen_distinct_valid_tasks():
    for table, num_colors, length in ((TABLE_A1, 8, 6), (TABLE_A2, 4, 3)):
        check_tasks(table, num_colors)
        assert len(set(table)) == 16
        assert {len(task) for task in table} == {length}
        assert {color for task in table for color in task} == set(range(num_colors))


def test_table_a1_is_made_of_the_four_pairs():
    pairs = {task[i : i + 2] for task in (*TABLE_A1, A1_POST) for i in range(0, len(task), 2)}
    assert pairs == {(0, 1), (2, 3), (4, 5), (6, 7)}


@pytest.mark.parametrize(("table", "post", "colors"), [(TABLE_A1, A1_POST, 2), (TABLE_A2, A2_POST, 1)])
def test_no_subgoal_transition_of_the_post_training_task_occurs_in_pretraining(table, post, colors):
    unseen = subgoal_transitions([post], colors)
    assert len(unseen) >= 3
    assert not unseen & subgoal_transitions(table, colors)


def test_transitions_are_ordered_pairs():
    assert transitions([(0, 1, 2), (2, 0)]) == {(0, 1), (1, 2), (2, 0)}


def test_the_vocabulary_is_every_color_or_the_distinct_chunks_of_the_tasks():
    assert subgoal_vocabulary(TABLE_A1, 2, 8) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert subgoal_vocabulary([(3, 1), (1, 0)], 2, 8) == ((1, 0), (3, 1))
    assert subgoal_vocabulary([(2, 0)], 1, 4) == ((0,), (1,), (2,), (3,))
    assert [format_task(subgoal) for subgoal in subgoal_vocabulary(TABLE_A1, 2, 8)] == ["0-1", "2-3", "4-5", "6-7"]
    assert [format_task(subgoal) for subgoal in subgoal_vocabulary(TABLE_A2, 1, 4)] == ["0", "1", "2", "3"]


def test_a_task_in_indices_of_its_subgoals():
    assert subgoal_chunks((0, 1, 4, 5), 2) == ((0, 1), (4, 5))
    assert subgoal_indices((4, 5, 0, 1), ((0, 1), (2, 3), (4, 5))) == (2, 0)
    assert transitions([subgoal_indices((4, 5, 0, 1), ((0, 1), (4, 5)))]) == {(1, 0)}
    with pytest.raises(ValueError, match="task 0-2 has subgoal 0-2, which is not among 0-1, 2-3"):
        subgoal_indices((0, 2), ((0, 1), (2, 3)))


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (2, "task 0-1-2 has 3 colors, no multiple of colors_per_subgoal 2: change the task or colors_per_subgoal"),
        (0, "colors_per_subgoal is 0; expected at least 1"),
    ],
)
def test_a_task_that_is_not_made_of_whole_subgoals_is_refused(unit, message):
    with pytest.raises(ValueError, match=message):
        subgoal_vocabulary([(0, 1), (0, 1, 2)], unit, 4)


def test_parse_and_format_are_inverse():
    assert parse_task("10-1-2") == (10, 1, 2)
    assert format_task((10, 1, 2)) == "10-1-2"


@pytest.mark.parametrize("text", ["", "0-", "0,1", "a-b", "0--1", "-1-2"])
def test_parse_rejects_what_is_not_a_task(text):
    with pytest.raises(ValueError, match="joined by '-'"):
        parse_task(text)


def test_read_tasks_takes_table_names_texts_and_colors():
    assert read_tasks("A2") is TABLE_A2
    assert read_tasks(["0-1", [2, 3]]) == ((0, 1), (2, 3))
    with pytest.raises(ValueError, match="'A7' is unknown"):
        read_tasks("A7")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "list of tasks is empty"),
        ([()], "empty task"),
        ([(0, 4)], "unknown color 4"),
        ([(0, -1)], "unknown color -1"),
        ([(0, 1), (2, 2, 1)], "color 2 twice in a row"),
    ],
)
def test_check_tasks_names_what_is_wrong(tasks, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(tasks, num_colors=4)


def test_pad_tasks():
    padded, lengths = pad_tasks([(0, 1, 2), (3,)])
    assert padded.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert lengths.tolist() == [3, 1]


def test_colors_can_be_counted_on_where_the_tasks_stay_the_same():
    assert color_shifts(TABLE_A2, 4) == (0, 1, 2, 3)
    assert color_shifts(TABLE_A2[:-1], 4) == (0,)
    assert color_shifts([(0, 2), (2, 0), (1, 3), (3, 1)], 4) == (0, 1, 2, 3)
    assert color_shifts([(0, 2), (2, 0)], 4) == (0, 2)
    assert color_shifts([(0,)], 2) == (0,)
