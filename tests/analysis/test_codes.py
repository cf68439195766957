from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from metacontroller.analysis import codes as codes_module
from metacontroller.analysis.codes import (
    code_subgoal_bits,
    injected_codes,
    mutual_information_bits,
    unseen_transition_share,
)
from metacontroller.envs.gridworld_pinpad import PinpadConfig
from metacontroller.envs.tasks import single_colors
from metacontroller.models.transformer import Transformer
from metacontroller.presets.gridworld import build_meta_controller, build_model, debug

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


def model_with_bias(environment: PinpadConfig, bias: list[float]) -> Transformer:
    """A model whose action logits are a constant, whatever it sees and however it is steered."""
    model = build_model(dataclasses.replace(debug(), environment=environment, tasks=((0, 1),), post_task=(1, 0)))
    with torch.no_grad():
        model.action_readout.linear.weight.zero_()
        model.action_readout.linear.bias.copy_(torch.tensor(bias))
    return model


def test_code_subgoal_bits_gives_proper_tables_and_the_same_ones_again() -> None:
    config = debug()
    model, meta_controller = build_model(config), build_meta_controller(config)
    first, again = (
        code_subgoal_bits(
            model,
            meta_controller,
            config.environment,
            codes=3,
            layouts_per_code=20,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    )
    assert first.share.shape == (3, 5)
    torch.testing.assert_close(first.share.sum(1), torch.ones(3))
    torch.testing.assert_close(first.marginal, first.share.mean(0))
    assert first.bits == again.bits
    assert torch.equal(first.share, again.share)


def test_the_first_color_is_what_the_moves_lead_to() -> None:
    environment = PinpadConfig(size=2, num_colors=2, num_walls=0)
    always_up = model_with_bias(environment, [50.0, 0.0, 0.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    controller = build_meta_controller(debug())
    meaning = code_subgoal_bits(always_up, controller, environment, codes=2, layouts_per_code=400, generator=generator)
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
    environment = PinpadConfig(size=3, num_colors=3, num_walls=0)
    model, generator = model_with_bias(environment, UNIFORM), torch.Generator().manual_seed(0)
    share = unseen_transition_share(model, environment, tasks, episodes=600, generator=generator)
    assert share == pytest.approx(expected, abs=0.07)


def test_unseen_transition_share_is_nan_when_every_color_may_follow() -> None:
    environment = PinpadConfig(size=3, num_colors=2, num_walls=0)
    model, generator = model_with_bias(environment, UNIFORM), torch.Generator().manual_seed(0)
    assert math.isnan(unseen_transition_share(model, environment, [(0, 1, 0)], episodes=10, generator=generator))


def test_codes_that_change_nothing_are_reached_as_often_as_free_walks_reach_them() -> None:
    environment = PinpadConfig(size=4, num_colors=3, num_walls=0, max_steps=40)
    model = model_with_bias(environment, [0.0] * 4)  # an aimless walk, however it is steered
    steering = build_meta_controller(debug())
    options = {"codes": 4, "layouts_per_code": 8, "walks": 2000, "generator": torch.Generator().manual_seed(0)}
    found = injected_codes(model, steering, environment, [(0, 1)], **options)
    assert 0.3 < found.free < 0.5  # one of two others; some walks reach no second color
    for share in (found.forced, found.free_unseen, found.forced_unseen):
        assert share == pytest.approx(found.free, abs=0.05)
    everything = [(a, b) for a in range(3) for b in range(3) if a != b]
    assert math.isnan(injected_codes(model, steering, environment, everything, **options).free_unseen)


def test_a_code_is_held_only_after_the_first_color() -> None:
    environment = PinpadConfig(size=4, num_colors=3, num_walls=0, max_steps=40)
    model = model_with_bias(environment, [0.0] * 4)
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
    generator, colors = torch.Generator().manual_seed(0), single_colors(3)
    first, _ = codes_module._two_subgoals(model, environment, colors, 64, generator, (steering, code))
    assert all(torch.equal(z, code.expand_as(z)) for z in seen)
    assert not acted[0].any()
    assert acted[-1].any()
    assert not (acted[-1] & (first < 0)).any()
