from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from metacontroller.analysis.code_content import (
    Walks,
    code_meaning,
    code_subgoal_bits,
    two_subgoals,
    unseen_transition_share,
)
from metacontroller.analysis.injection import Injection, InjectionResult, injected_codes
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import run_analysis
from metacontroller.domains.base import Domain
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad, GridworldPinpadConfig
from metacontroller.metrics.information import mutual_information_bits
from metacontroller.models.protocol import SteerableModel
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_meta_controller, build_model

TRIES = 100_000


def miller_madow(codes: int, outcomes: int, tries: int) -> float:
    return (codes - 1) * (outcomes - 1) / (2 * tries * math.log(2))


def test_codes_that_each_name_a_color_of_four_carry_two_bits() -> None:
    counts = torch.eye(4).repeat(2, 1) * 50
    assert mutual_information_bits(counts) == pytest.approx(2 - miller_madow(8, 4, 400))


def test_codes_that_all_lead_alike_carry_nothing_but_the_correction() -> None:
    counts = torch.tensor([[10, 20, 30, 40]]).repeat(5, 1)
    assert mutual_information_bits(counts) == pytest.approx(-miller_madow(5, 4, 500))


def test_a_table_worked_by_hand() -> None:
    # p(o|0) = (3/4, 1/4), p(o|1) = (1/4, 3/4): 1 - H(1/4) = 0.188722 bits; the third outcome never occurs.
    counts = torch.tensor([[3, 1, 0], [1, 3, 0]]) * TRIES
    assert mutual_information_bits(counts) == pytest.approx(0.188722, abs=1e-5)


def test_the_correction_removes_the_bias_of_few_tries() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [F.one_hot(torch.randint(4, (64, 64), generator=generator), 4).sum(1) for _ in range(30)]
    mean = sum(map(mutual_information_bits, tables)) / len(tables)
    assert abs(mean) < 0.1 * miller_madow(64, 4, 64 * 64)


def grid_world(size: int, num_colors: int, tasks: list[tuple[int, ...]]) -> GridworldPinpad:
    """A grid without walls, each color of which is a subgoal."""
    config = GridworldPinpadConfig(
        size=size, num_colors=num_colors, num_walls=0, tasks=tuple(tasks), post_task=(1, 0), colors_per_subgoal=1
    )
    return GridworldPinpad(config)


def model_with_bias(world: Domain, bias: list[float]) -> SteerableModel:
    """A model whose action logits are a constant, whatever it sees and however it is steered."""
    model = build_model(dataclasses.replace(debug(), domain=world.config))
    with torch.no_grad():
        model.action_readout.linear.weight.zero_()
        model.action_readout.linear.bias.copy_(torch.tensor(bias))
    return model


def test_code_meaning_gives_proper_tables_and_the_same_ones_again(untrained: Callable[..., LoadedRun]) -> None:
    run = untrained()
    first, again = (code_meaning(run, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.share.shape == (run.settings.codes, 5)
    torch.testing.assert_close(first.share.sum(1), torch.ones(run.settings.codes))
    torch.testing.assert_close(first.marginal, first.share.mean(0))
    assert first.bits == again.bits
    assert torch.equal(first.share, again.share)


def test_walks_last_as_long_as_the_settings_say_or_half_of_the_longest_episode(
    untrained: Callable[..., LoadedRun],
) -> None:
    config = debug()
    assert untrained(config).walk_steps == config.evaluate.walk_steps
    unset = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, walk_steps=None))
    assert untrained(unset).walk_steps == config.domain.max_steps // 2


def test_the_first_color_is_what_the_moves_lead_to() -> None:
    world = grid_world(2, 2, [(0, 1)])
    always_up = model_with_bias(world, [50.0, 0.0, 0.0, 0.0])
    walks = Walks(always_up, world, 8, torch.Generator().manual_seed(0))
    meaning = code_subgoal_bits(walks, build_meta_controller(debug()), codes=2, layouts_per_code=400)
    # From the lower row, up enters either color or the empty cell, equally likely; from the upper row, nothing.
    expected = torch.tensor([2 / 3, 1 / 6, 1 / 6])
    torch.testing.assert_close(meaning.marginal, expected, atol=0.06, rtol=0)
    assert abs(meaning.bits) < 0.03


UNIFORM = [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([(0, 1), (1, 2), (2, 0)], 0.5),  # one of the two others never follows
        ([(0, 1, 0, 2), (1, 2)], 1.0),  # nothing follows 2; of 0 and 1 nothing is unseen, so they do not count
    ],
)
def test_a_random_walk_takes_unseen_transitions_at_chance(tasks: list[tuple[int, ...]], expected: float) -> None:
    world = grid_world(3, 3, tasks)
    share = unseen_transition_share(aimless(world, 12), episodes=600)
    assert share == pytest.approx(expected, abs=0.07)


def aimless(world: Domain, steps: int) -> Walks:
    """Walks of a model that goes anywhere, however it is steered."""
    return Walks(model_with_bias(world, UNIFORM), world, steps, torch.Generator().manual_seed(0))


def untold(world: GridworldPinpad) -> GridworldPinpad:
    """The same world, silent about what follows what in its demonstrations."""

    class Untold(GridworldPinpad):
        def seen_transitions(self) -> None:
            return None

    return Untold(world.config)


@pytest.mark.parametrize("world", [grid_world(3, 2, [(0, 1, 0)]), untold(grid_world(3, 3, [(0, 1)]))])
def test_unseen_transition_share_is_nan_when_everything_may_follow_or_nobody_knows(world: GridworldPinpad) -> None:
    assert math.isnan(unseen_transition_share(aimless(world, 12), episodes=10))


def inject(world: Domain, count: int = 1000) -> InjectionResult:
    """`injected_codes` of a metacontroller that has learned nothing."""
    steering, walks = build_meta_controller(debug()), aimless(world, 16)
    meaning = code_subgoal_bits(walks, steering, codes=4, layouts_per_code=8)
    return injected_codes(walks, steering, meaning, count)


def test_codes_that_change_nothing_are_reached_as_often_as_free_walks_reach_them() -> None:
    injected = inject(grid_world(4, 3, [(0, 1)]))
    assert 0.3 < injected.free < 0.5  # one of two others; some walks reach no second color
    for share in (injected.forced, injected.free_unseen, injected.forced_unseen):
        assert share == pytest.approx(injected.free, abs=0.05)
    for first, row in enumerate(injected.by_transition):
        assert math.isnan(row[first])
        others = [share for second, share in enumerate(row) if second != first]
        assert others == pytest.approx([injected.free] * 2, abs=0.09)


@pytest.mark.parametrize(
    "world",
    [grid_world(4, 3, [(a, b) for a in range(3) for b in range(3) if a != b]), untold(grid_world(4, 3, [(0, 1)]))],
)
def test_where_nothing_is_unseen_or_nobody_knows_the_rest_is_measured(world: GridworldPinpad) -> None:
    injected = inject(world, 50)
    assert math.isnan(injected.free_unseen)
    assert math.isnan(injected.forced_unseen)
    assert 0 < injected.free < 1


def test_the_analysis_of_injection_is_strict_json(untrained: Callable[..., LoadedRun]) -> None:
    results = run_analysis("injection", untrained(), Injection.Config(walks=8))
    numbers = ["free", "forced", "free_unseen", "forced_unseen", "walks"]
    assert set(results) == {*numbers, "by_transition"}
    json.dumps(results, allow_nan=False)
    assert [name for name, _ in Injection().rows([results])] == numbers
    with pytest.raises(ValueError, match="walks is 0; expected at least 1"):
        Injection.Config(walks=0)


def test_a_code_is_held_only_after_the_first_color() -> None:
    world = grid_world(4, 3, [(0, 1)])
    model = model_with_bias(world, UNIFORM)
    steering, seen = build_meta_controller(debug()), []
    code = torch.randn(steering.dim_latent)

    def steer(residual: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        seen.append(z)
        return torch.full_like(residual, math.inf)  # where it acts, it cannot go unnoticed

    acted: list[torch.Tensor] = []
    upper = model.upper

    def watch(residual: torch.Tensor, cache: Any) -> torch.Tensor:
        acted.append(residual[:, 0, 0].isinf())
        return upper(torch.zeros_like(residual), cache)

    model.upper = watch  # type: ignore[method-assign]
    steering.steer = steer  # type: ignore[method-assign]
    walks = Walks(model, world, 16, torch.Generator().manual_seed(0))
    first, _ = two_subgoals(walks, 64, (steering, code))
    assert all(torch.equal(z, code.expand_as(z)) for z in seen)
    assert not acted[0].any()
    assert acted[-1].any()
    assert not (acted[-1] & (first < 0)).any()
