"""Clips of demonstrations: where they begin, what they hold, and their mean over several processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.objectives.clips import CLIPS_OF_EACH, clip_extras, clips_of, cut_clips, draw_clips

LENGTHS = torch.tensor([9, 2, 6])
AT = torch.zeros(3, 9, dtype=torch.bool)
AT[0, [4, 6, 7]] = AT[1, 1] = AT[2, 3] = True


def random_state(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def episodes(lengths: Tensor = LENGTHS) -> Trajectories:
    """A state is the number of its row times 100, plus that of its step, and an action the same minus 0.5."""
    time = torch.arange(10.0).clamp(max=lengths[:, None]) + 100 * torch.arange(len(lengths))[:, None]
    return Trajectories(states=time[..., None], actions=time[:, :-1, None] - 0.5, lengths=lengths)


def test_clips_are_pieces_of_episodes_that_begin_at_decisions() -> None:
    whole = episodes()
    drawn = cut_clips(whole, AT, 3 * CLIPS_OF_EACH, 3, random_state())
    assert drawn.rows.tolist() == [row for row in range(3) for _ in range(CLIPS_OF_EACH)]
    found = {row: set(drawn.starts[drawn.rows == row].tolist()) for row in range(3)}
    assert found == {0: {0, 4, 6}, 1: {0}, 2: {0, 3}}  # 7 leaves too few steps
    for number, (row, start) in enumerate(zip(drawn.rows.tolist(), drawn.starts.tolist(), strict=True)):
        count = int(drawn.clips.lengths[number])
        assert count == min(3, int(LENGTHS[row]) - start)
        assert torch.equal(drawn.clips.states[number, : count + 1], whole.states[row, start : start + count + 1])
        assert torch.equal(drawn.clips.actions[number, :count], whole.actions[row, start : start + count])


def test_as_many_are_drawn_as_asked_for_from_new_demonstrations() -> None:
    asked = []

    def generate(n: int, generator: torch.Generator) -> Trajectories:
        asked.append(n)
        return episodes(torch.full((n,), 9))

    drawn = draw_clips(generate, lambda whole: torch.zeros_like(whole.mask()), 19, 2, random_state())
    assert asked == [3]
    assert drawn.clips.states.shape == (19, 3, 1)
    assert bool((drawn.starts == 0).all())


def test_means_over_the_clips_of_several_processes_add_up_to_that_of_one() -> None:
    drawn, batch = cut_clips(episodes(), AT, 12, 3, random_state()), episodes()
    extras = clip_extras(drawn, batch)

    def mean(rows: list[int]) -> float:
        kept = torch.tensor(rows)
        own = replace(batch, states=batch.states[kept], actions=batch.actions[kept], lengths=batch.lengths[kept])
        clips, factor = clips_of({name: value[kept] for name, value in extras.items()}, own)
        share = own.lengths.sum() / batch.lengths.sum()
        return float(share * factor * masked_mean(clips.actions[..., 0], clips.mask()))

    expected = masked_mean(drawn.clips.actions[..., 0], drawn.clips.mask())
    assert mean([0, 1, 2]) == pytest.approx(float(expected), rel=1e-6)
    assert mean([0]) + mean([1, 2]) == pytest.approx(float(expected), rel=1e-6)
