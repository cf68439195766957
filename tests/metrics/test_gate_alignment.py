"""Switches against changes of subgoal, counted by hand."""

from __future__ import annotations

import pytest
import torch

from metacontroller.metrics.switch_alignment import codes_taken, gate_alignment, gate_report, gate_sums, subgoal_changes

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 9]])  # changes at steps 3 and 7; the last step is padding
LENGTHS = torch.tensor([9])


def beta(*switches: int) -> torch.Tensor:
    values = torch.full((1, 10), 0.2)
    values[0, 0] = values[0, 9] = 1.0  # the first step always switches, padding does not count
    values[0, list(switches)] = 0.5  # at the threshold
    return values


def test_a_change_is_the_first_step_of_a_new_subgoal() -> None:
    assert subgoal_changes(SEGMENTS, LENGTHS).nonzero()[:, 1].tolist() == [3, 7]


@pytest.mark.parametrize(
    ("switches", "tolerance", "recall", "precision"),
    [
        ((3, 7), 0, 1.0, 1.0),
        ((2, 8), 0, 0.0, 0.0),
        ((2, 8), 1, 1.0, 1.0),
        ((1, 5), 1, 0.0, 0.0),
        ((1, 5), 2, 1.0, 1.0),
        ((3,), 1, 0.5, 1.0),
        ((3, 5, 7), 1, 1.0, 2 / 3),
        ((), 1, 0.0, 0.0),
    ],
)
def test_recall_and_precision(switches: tuple[int, ...], tolerance: int, recall: float, precision: float) -> None:
    found = gate_alignment(beta(*switches), SEGMENTS, LENGTHS, threshold=0.5, tolerance=tolerance)
    assert float(found["gate_recall"]) == pytest.approx(recall)
    assert float(found["gate_precision"]) == pytest.approx(precision)
    assert codes_taken(beta(*switches), LENGTHS, threshold=0.5).tolist() == [1 + len(switches)]


def test_a_perfect_gate_is_perfect_at_its_own_threshold() -> None:
    perfect = torch.tensor([[1.0, 0.6, 0.6, 0.95, 0.6, 0.6, 0.6, 0.9, 0.6, 1.0]])
    found = {at: gate_alignment(perfect, SEGMENTS, LENGTHS, threshold=at, tolerance=0) for at in (0.5, 0.9)}
    assert (float(found[0.9]["gate_recall"]), float(found[0.9]["gate_precision"])) == (1.0, 1.0)
    assert float(found[0.5]["gate_precision"]) == pytest.approx(2 / 8)
    report = gate_report(perfect, SEGMENTS, LENGTHS, threshold=0.9)
    assert report["recall"] == report["precision"] == report["f1"] == [1.0, 1.0, 1.0]


def test_sums_of_parts_give_the_alignment_of_the_whole() -> None:
    wide = torch.cat([beta(3, 5, 7), beta(8), beta(), beta(4)])
    segments = torch.cat([SEGMENTS, SEGMENTS, torch.zeros_like(SEGMENTS), SEGMENTS])  # the third has no change
    lengths = torch.tensor([9, 6, 4, 9])
    whole = gate_alignment(wide, segments, lengths, threshold=0.5)
    cuts = (slice(0, 1), slice(1, 3), slice(3, 4))
    parts = [gate_sums(wide[rows], segments[rows], lengths[rows], threshold=0.5) for rows in cuts]
    for name, value in whole.items():
        added = sum(float(part[name].total) for part in parts) / sum(float(part[name].count) for part in parts)
        assert float(value) == pytest.approx(added)
    mean = sum(float(part["gate_recall"].mean) for part in parts) / len(parts)
    assert float(whole["gate_recall"]) != pytest.approx(mean)


def test_a_report_judges_at_multiples_of_the_tolerance() -> None:
    report = gate_report(beta(1, 5), SEGMENTS, LENGTHS, threshold=0.5, tolerance=2)
    assert report["tolerance"] == [0, 2, 4]
    assert report["recall"] == report["f1"] == [0.0, 1.0, 1.0]
