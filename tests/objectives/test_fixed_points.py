"""Codes from fixed points: found in a world of points to be walked to, against slow versions, refused where too few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from metacontroller.objectives.fixed_points import BEFORE, FLOOR, LIKELIER, STRIDE, FixedPoints

THINGS, LEGS, STEPS = 3, 2, 60


def walks(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Straight walks to one thing and then to another, at a speed of each leg's own.

    Positions (b, t + 1, 2 + 2 things): the walker's place and where each thing is from there. lengths (b,). Which thing
    is walked to at each step, (b, t).
    """
    things = torch.rand(count, THINGS, 2, generator=generator) * 2 - 1
    order = torch.stack([torch.randperm(THINGS, generator=generator)[:LEGS] for _ in range(count)])
    steps = torch.randint(25, 31, (count, LEGS), generator=generator)
    place = torch.rand(count, 2, generator=generator) * 2 - 1
    places = torch.zeros(count, STEPS + 1, 2)
    goals = torch.zeros(count, STEPS, dtype=torch.long)
    for row in range(count):
        at, here = 0, place[row]
        places[row, 0] = here
        for leg in range(LEGS):
            target, taken = things[row, order[row, leg]], int(steps[row, leg])
            places[row, at + 1 : at + taken + 1] = here + (target - here) * torch.arange(1, taken + 1)[:, None] / taken
            goals[row, at : at + taken] = order[row, leg]
            at, here = at + taken, target
        places[row, at + 1 :] = here
        goals[row, at:] = order[row, -1]
    relative = things[:, None] - places[:, :, None]
    return torch.cat([places, relative.flatten(2)], -1), steps.sum(1), goals


@pytest.mark.parametrize("seed", range(3))
def test_things_are_told_apart_and_every_arrival_is_found(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions, lengths, _ = walks(200, generator)
    found = FixedPoints.fit(positions[None], lengths, THINGS, generator)
    positions, lengths, goals = walks(100, torch.Generator().manual_seed(99))
    codes = found.codes(positions, lengths)
    real = torch.arange(STEPS) < lengths[:, None]
    table = torch.zeros(THINGS, THINGS).index_put_((codes[real], goals[real]), torch.ones(()), accumulate=True)
    assert sorted(table.argmax(1).tolist()) == list(range(THINGS))
    renamed = table.argmax(1)[codes]
    assert float((renamed == goals)[real].double().mean()) > 0.93  # an arrival is seen a step or two early


def test_views_of_a_turned_world_count_as_more_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    positions, lengths, _ = walks(60, generator)
    turned = torch.stack([-positions[..., 1::2], positions[..., ::2]], -1).flatten(-2)
    both = FixedPoints.fit(torch.stack([positions, turned]), lengths, 2, torch.Generator().manual_seed(1))
    twice = FixedPoints.fit(torch.stack([positions, positions]), lengths, 2, torch.Generator().manual_seed(1))
    once = FixedPoints.fit(positions[None], lengths, 2, torch.Generator().manual_seed(1))
    assert not torch.allclose(both.maps, once.maps, atol=1e-3)
    torch.testing.assert_close(twice.maps, once.maps, rtol=0.05, atol=0.05)


def test_the_evidence_is_a_difference_of_log_densities() -> None:
    generator = torch.Generator().manual_seed(0)
    positions, lengths, _ = walks(80, generator)
    found = FixedPoints.fit(positions[None], lengths, 2, generator)
    real = torch.arange(STEPS + 1) <= lengths[:, None]
    x = (positions.double() - found.mean) / found.std
    residual = F.pad(x, (0, 1), value=1.0) @ found.maps[1] - x
    size = x.shape[-1]
    spread = torch.cov(residual[real].T, correction=0) + FLOOR * torch.eye(size).double()
    anywhere = MultivariateNormal(residual[real].mean(0), spread)
    whitening = found.at_ends.whitening[1]
    at_ends = MultivariateNormal(torch.zeros(size).double(), precision_matrix=whitening @ whitening.T)
    slow = at_ends.log_prob(residual) - anywhere.log_prob(residual)
    torch.testing.assert_close(found.evidence(positions)[..., 1], slow, rtol=1e-5, atol=1e-5)


def test_a_step_has_the_code_of_the_next_arrival() -> None:
    generator = torch.Generator().manual_seed(0)
    positions, lengths, _ = walks(60, generator)
    found = FixedPoints.fit(positions[None], lengths, THINGS, generator)
    evidence, codes = found.evidence(positions), found.codes(positions, lengths)
    arrivals = 0
    for row in range(20):
        end = int(lengths[row])
        for step in range(end):
            expected = None
            for entry in range(step + 1, end + 1):
                new = (evidence[row, entry] > LIKELIER) & ~(evidence[row, entry - 1] > LIKELIER)
                if bool(new.any()):
                    arrivals += entry < end
                    expected = int(torch.where(new, evidence[row, entry], -torch.inf).argmax())
                    break
                if entry == end:
                    expected = int(evidence[row, entry].argmax())
            assert int(codes[row, step]) == expected
        assert (codes[row, end:] == codes[row, end - 1]).all()
    assert arrivals > 33


def test_too_few_demonstrations_are_refused() -> None:
    positions, lengths, _ = walks(10, torch.Generator().manual_seed(0))
    pairs = 10 * BEFORE
    assert int(lengths.min()) > STRIDE * BEFORE
    with pytest.raises(ValueError, match=rf"10 demonstrations give {pairs} pairs to fit 4 linear maps of 8 numbers to"):
        FixedPoints.fit(positions[None], lengths, 4, torch.Generator())
