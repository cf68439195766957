from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metacontroller.analysis.switching import gate_alignment
from metacontroller.control.metacontroller import MetaController
from metacontroller.envs.gridworld_pinpad import PinpadBatch
from metacontroller.models.transformer import Transformer
from metacontroller.phases import evaluate as module
from metacontroller.phases.evaluate import Policy, batch_sizes, evaluate, gate_figures, gate_on_new_layouts
from metacontroller.phases.internal_rl import task_grids
from metacontroller.phases.rollout import rollout_raw
from metacontroller.presets.gridworld import build_meta_controller, build_model, debug, generate

CONFIG = debug()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(CONFIG).eval()


@pytest.fixture(scope="module")
def meta_controller() -> MetaController:
    return build_meta_controller(CONFIG).eval()


@pytest.mark.parametrize("policy", ["base", "raw", "prior", "internal-rl"])
def test_evaluate_reports_means_over_its_episodes(
    model: Transformer, meta_controller: MetaController, policy: Policy
) -> None:
    result = evaluate(model, meta_controller, CONFIG.environment, policy, (2,), 200, seed=1)
    success = result["success"]
    assert 0 < success < 1  # one of four colors, by chance
    assert result["subgoals"] == pytest.approx(success)  # a task of one color
    assert result["success_se"] == pytest.approx(math.sqrt(success * (1 - success) / 200))
    assert 1 <= result["steps"] <= CONFIG.environment.max_steps
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


def generous(*arguments: Any) -> PinpadBatch:
    grids = task_grids(*arguments)
    grids.__class__ = Generous
    return grids


def test_success_is_what_the_environment_says_whatever_the_return(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = evaluate(model, None, CONFIG.environment, "base", (2,), 200, seed=1)
    monkeypatch.setattr(module, "task_grids", generous)
    result = evaluate(model, None, CONFIG.environment, "base", (2,), 200, seed=1)
    for name in ("success", "success_se", "steps", "subgoals"):
        assert result[name] == plain[name]
    assert plain["mean_return"] == plain["success"]
    assert result["mean_return"] == pytest.approx(3 * result["success"] + 0.5 * result["steps"], rel=1e-5)
    generator = torch.Generator().manual_seed(1)
    returns = rollout_raw(model, generous(CONFIG.environment, (2,), 200, generator), generator).returns
    assert result["return_se"] == pytest.approx(float(returns.std()) / math.sqrt(200), rel=1e-5)
    assert evaluate(model, None, CONFIG.environment, "base", (2,), 1, seed=1)["return_se"] is None


def test_the_seed_decides_the_result(model: Transformer) -> None:
    first, again, other = (evaluate(model, None, CONFIG.environment, "base", (0, 1), 64, seed) for seed in (1, 1, 2))
    assert first == again
    assert first["steps"] != other["steps"]


def test_prior_codes_are_not_those_of_a_policy_that_has_moved(model: Transformer) -> None:
    moved = build_meta_controller(CONFIG)
    with torch.no_grad():
        moved.policy.readout.bias.add_(3.0)
    untrained = build_meta_controller(CONFIG)
    environment, task = CONFIG.environment, CONFIG.post_task
    prior = evaluate(model, moved, environment, "prior", task, 64, 1)
    same = evaluate(model, untrained, environment, "internal-rl", task, 64, 1)
    policy = evaluate(model, moved, environment, "internal-rl", task, 64, 1)
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
    model: Transformer, meta_controller: MetaController, change: dict[str, Any], sentence: str
) -> None:
    given: dict[str, Any] = {"task": (0, 1), "episodes": 4, "meta_controller": meta_controller, **change}
    with pytest.raises(ValueError, match=sentence):
        evaluate(model=model, environment=CONFIG.environment, policy="prior", seed=0, **given)


def test_gate_figures_count_over_all_episodes_and_not_per_batch(
    model: Transformer, meta_controller: MetaController, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Callable = generate(CONFIG, "discover")
    monkeypatch.setattr(module, "MAX_BATCH", 7)
    beta, code, fresh = gate_on_new_layouts(model, meta_controller, source, 20, seed=3)
    assert fresh.segments is not None
    assert beta.shape == fresh.actions.shape
    assert code.shape == (*beta.shape, CONFIG.meta_controller.dim_latent)
    expected = gate_alignment(beta, fresh.segments, fresh.lengths)
    measured = gate_figures(model, meta_controller, source, 20, seed=3)
    assert measured == {name: pytest.approx(float(value)) for name, value in expected.items()}


def test_gate_values_of_an_episode_do_not_depend_on_its_batch(model: Transformer) -> None:
    source, quiet = generate(CONFIG, "discover"), build_meta_controller(CONFIG)
    readout = quiet.encoder[-1]
    assert isinstance(readout, torch.nn.Linear)
    with torch.no_grad():  # no noise in the codes
        readout.weight[CONFIG.meta_controller.dim_latent :] = 0.0
        readout.bias[CONFIG.meta_controller.dim_latent :] = -20.0
    whole, codes, fresh = gate_on_new_layouts(model, quiet, source, 12, seed=3)
    row = int(fresh.lengths.argmin())
    length = int(fresh.lengths[row])
    alone = fresh.index(torch.tensor([row]))
    with torch.no_grad():
        output = quiet.discover_episodes(model, alone.states, alone.actions, alone.lengths)
    torch.testing.assert_close(whole[row, :length], output.beta[0, :length], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codes[row, :length], output.z[0, :length], atol=1e-3, rtol=1e-3)  # noise of e^-10
