"""Alignment of the gate with subgoals: precision and recall of switches against true subgoal changes (Fig. 6, A3)."""

from __future__ import annotations

import torch
from torch import Tensor

from metacontroller.data.trajectories import Ratio, length_mask, masked_mean, masked_sums

TOLERANCES = (0, 1, 2)
"""Multiples of a world's tolerance at which a report judges."""

HISTOGRAM_BINS = 20


def codes_taken(beta: Tensor, lengths: Tensor, *, threshold: float) -> Tensor:
    """Codes of each episode, (b,) int64: one at the first step and one at each later step with beta >= threshold.

    beta (b, t), lengths (b,).
    """
    return 1 + ((beta >= threshold) & later_steps(lengths, beta.shape[1])).sum(1)


def binary_fraction(beta: Tensor, lengths: Tensor) -> Tensor:
    """Share of beta (b, t) outside (0.1, 0.9), a scalar, without each episode's first step. lengths (b,)."""
    return masked_mean(_decided(beta), later_steps(lengths, beta.shape[1]))


def later_steps(lengths: Tensor, steps: int) -> Tensor:
    """(b, steps) bool: real steps without each episode's first, which always switches. lengths (b,)."""
    later = length_mask(lengths, steps)
    later[:, 0] = False
    return later


def subgoal_changes(segments: Tensor, lengths: Tensor) -> Tensor:
    """(b, t) bool: the first action of each new subgoal, without the episode's first. segments (b, t) int64."""
    changed = torch.zeros_like(segments, dtype=torch.bool)
    changed[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return changed & length_mask(lengths, segments.shape[1])


def gate_sums(
    beta: Tensor, segments: Tensor, lengths: Tensor, *, threshold: float, tolerance: int = 1
) -> dict[str, Ratio]:
    """Alignment of switches (beta >= threshold) with true subgoal changes, without the forced first switch.

    beta (b, t), segments (b, t) int64 index of the subgoal in its task, lengths (b,). A change counts as detected if
    a switch lies within ``tolerance`` steps, a switch as correct if a change does.
    Returns gate_recall, the share of changes detected; gate_precision, the share of switches that are correct (0
    without switches); gate_binary_fraction, the share of beta outside (0.1, 0.9).
    """
    later, change = later_steps(lengths, beta.shape[1]), subgoal_changes(segments, lengths)
    switch = (beta >= threshold) & later
    return {
        "gate_recall": masked_sums(_near(switch, tolerance).to(beta.dtype), change),
        "gate_precision": masked_sums(_near(change, tolerance).to(beta.dtype), switch),
        "gate_binary_fraction": masked_sums(_decided(beta), later),
    }


def gate_alignment(
    beta: Tensor, segments: Tensor, lengths: Tensor, *, threshold: float, tolerance: int = 1
) -> dict[str, Tensor]:
    """`gate_sums` as scalars."""
    sums = gate_sums(beta, segments, lengths, threshold=threshold, tolerance=tolerance)
    return {name: ratio.mean for name, ratio in sums.items()}


def gate_report(
    beta: Tensor, segments: Tensor, lengths: Tensor, *, threshold: float, tolerance: int = 1
) -> dict[str, list[float]]:
    """Alignment of the gate at all `TOLERANCES`, multiples of ``tolerance`` steps, and histograms of beta (Fig. 6, A3);
    the other arguments: see `gate_alignment`.

    Returns lists: tolerance, recall, precision, f1, one entry per tolerance; at_change and elsewhere, the share of beta
    in each of `HISTOGRAM_BINS` equal bins of [0, 1], at the first step of each new subgoal and at all other steps,
    without an episode's first.
    """
    report: dict[str, list[float]] = {name: [] for name in ("tolerance", "recall", "precision", "f1")}
    for steps in (multiple * tolerance for multiple in TOLERANCES):
        alignment = gate_alignment(beta, segments, lengths, threshold=threshold, tolerance=steps)
        recall, precision = float(alignment["gate_recall"]), float(alignment["gate_precision"])
        f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
        for name, value in (("tolerance", steps), ("recall", recall), ("precision", precision), ("f1", f1)):
            report[name].append(value)
    change, later = subgoal_changes(segments, lengths), later_steps(lengths, beta.shape[1])
    for name, where in (("at_change", change), ("elsewhere", later & ~change)):
        counts = torch.histc(beta[where].float(), HISTOGRAM_BINS, 0.0, 1.0)
        report[name] = (counts / counts.sum().clamp_min(1)).tolist()
    return report


def _decided(beta: Tensor) -> Tensor:
    """1 where beta (b, t) is outside (0.1, 0.9), 0 elsewhere."""
    return ((beta <= 0.1) | (beta >= 0.9)).to(beta.dtype)


def _near(marks: Tensor, tolerance: int) -> Tensor:
    """(b, t) bool: whether one of marks (b, t) lies within ``tolerance`` steps."""
    width = 2 * tolerance + 1
    spread = torch.nn.functional.max_pool1d(marks.float()[:, None], width, stride=1, padding=tolerance)
    return spread[:, 0] > 0
