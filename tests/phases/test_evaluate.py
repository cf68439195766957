from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad
from metacontroller.domains.gridworld_pinpad.simulator import PinpadBatch
from metacontroller.domains.registry import domain_of
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.evaluate import Policy, batch_sizes, evaluate
from metacontroller.phases.rollout import rollout_raw
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_meta_controller, build_model

CONFIG = debug()
WORLD = domain_of(CONFIG.domain)


@pytest.fixture(scope="module")
def model() -> SteerableModel:
    return build_model(CONFIG).eval()


@pytest.fixture(scope="module")
def meta_controller() -> MetaController:
    return build_meta_controller(CONFIG).eval()


@pytest.mark.parametrize("policy", ["base", "raw", "prior", "internal-rl"])
def test_evaluate_reports_means_over_its_episodes(
    model: SteerableModel, meta_controller: MetaController, policy: Policy
) -> None:
    result = evaluate(model, meta_controller, WORLD, policy, (2,), 200, seed=1)
    success = result["success"]
    assert 0 < success < 1  # one of four colors, by chance
    assert result["subgoals"] == pytest.approx(success)  # a task of one color
    assert result["success_se"] == pytest.approx(math.sqrt(success * (1 - success) / 200))
    assert 1 <= result["steps"] <= CONFIG.domain.max_steps
    assert (result["policy"], result["task"], result["episodes"]) == (policy, "2", 200)
    if policy in ("base", "raw"):
        assert result["decisions"] is None
    else:
        assert 1 <= result["decisions"] <= result["steps"]


class Generous(PinpadBatch):
    """The same grids with other rewards: 3 for the task, and a little for every step."""

    def step(self, actions: Tensor) -> Tensor:
        running = ~(self.terminated | self.truncated)
        return 3 * super().step(actions) + 0.5 * running


class GenerousWorld(GridworldPinpad):
    def reset(self, *arguments: Any, **options: Any) -> PinpadBatch:
        grids = super().reset(*arguments, **options)
        grids.__class__ = Generous
        return grids


def test_success_is_what_the_environment_says_whatever_the_return(model: SteerableModel) -> None:
    generous = GenerousWorld(CONFIG.domain)
    plain = evaluate(model, None, WORLD, "base", (2,), 200, seed=1)
    result = evaluate(model, None, generous, "base", (2,), 200, seed=1)
    for name in ("success", "success_se", "steps", "subgoals"):
        assert result[name] == plain[name]
    assert plain["mean_return"] == plain["success"]
    assert result["mean_return"] == pytest.approx(3 * result["success"] + 0.5 * result["steps"], rel=1e-5)
    generator = torch.Generator().manual_seed(1)
    returns = rollout_raw(model, generous.reset(200, generator, task=(2,)), generator).returns
    assert result["return_se"] == pytest.approx(float(returns.std()) / math.sqrt(200), rel=1e-5)
    assert evaluate(model, None, generous, "base", (2,), 1, seed=1)["return_se"] is None


def test_the_seed_decides_the_result(model: SteerableModel) -> None:
    first, again, other = (evaluate(model, None, WORLD, "base", (0, 1), 64, seed) for seed in (1, 1, 2))
    assert first == again
    assert first["steps"] != other["steps"]


def test_prior_codes_are_not_those_of_a_policy_that_has_moved(model: SteerableModel) -> None:
    moved = build_meta_controller(CONFIG)
    with torch.no_grad():
        moved.policy.readout.bias.add_(3.0)
    untrained = build_meta_controller(CONFIG)
    prior = evaluate(model, moved, WORLD, "prior", None, 64, 1)
    same = evaluate(model, untrained, WORLD, "internal-rl", None, 64, 1)
    policy = evaluate(model, moved, WORLD, "internal-rl", None, 64, 1)
    assert {**prior, "policy": ""} == {**same, "policy": ""}  # the policy starts as the prior
    assert prior["steps"] != policy["steps"]


def test_batches_are_bounded() -> None:
    assert batch_sizes(2500) == [1024, 1024, 452]
    assert batch_sizes(1024) == [1024]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"episodes": 0}, "episodes is 0; expected at least 1"),
        ({"task": (0, 9)}, "task 0-9 has unknown color 9"),
        ({"meta_controller": None}, "policy 'prior' acts through a metacontroller"),
    ],
)
def test_bad_input_is_refused(
    model: SteerableModel, meta_controller: MetaController, change: dict[str, Any], sentence: str
) -> None:
    given: dict[str, Any] = {"task": (0, 1), "episodes": 4, "meta_controller": meta_controller, **change}
    with pytest.raises(ValueError, match=sentence):
        evaluate(model=model, domain=WORLD, policy="prior", seed=0, **given)
