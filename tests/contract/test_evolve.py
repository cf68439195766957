"""Evolution strategies over the policy: it gets better, nothing else changes, and what is missing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller import MetaController, Transformer
from metacontroller.errors import DivergedError

USAGE = """
model.meta_controller = meta_controller

def environment_callable(model):
    # return a fitness score
    return 1.0

model.evolve(
    num_generations = 10,
    environment = environment_callable
)
"""


def make_model(steered: bool = True) -> Transformer:
    model = Transformer(
        8,
        action_embed_readout={"num_discrete": 3},
        state_embed_readout={"num_continuous": 2},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    )
    if steered:
        model.meta_controller = MetaController(8, dim_meta_controller=4, dim_latent=2, rank=2)
    return model


def first_code(model: Transformer) -> torch.Tensor:
    """Mean of the policy's first code, which starts at zero."""
    _, cache = model(torch.ones(1, 1, 2), return_cache=True)
    return cache.prev_hiddens.meta_controller.action_dist[0, 0, :2]


def fitness(model: Any) -> float:
    """The nearer the first code's mean is to (1, 1), the better."""
    return -float((first_code(model).detach() - 1).square().sum())


def test_usage_as_written() -> None:
    model = make_model()
    names = {"model": model, "meta_controller": model.meta_controller}
    model.meta_controller = None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exec(USAGE, names)
    assert model.meta_controller is names["meta_controller"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_policy_improves_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = fitness(model)
    history = model.evolve(4, fitness, noise_population_size=8, noise_scale=0.1, learning_rate=0.02)
    assert history.shape == (4, 8, 2)
    assert not history.is_inference()
    assert fitness(model) > start + 0.5
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"meta_controller.policy.readout.bias"} <= changed
    assert all(name.startswith("meta_controller.policy.") for name in changed)
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_generation_is_a_step_along_the_mean_of_normalised_fitness_times_noise() -> None:
    """One generation of SGD from rest, with the noise read off the weights that the environment sees."""
    model = make_model().double()
    policy = model.meta_controller.policy
    start = {name: value.detach().clone() for name, value in policy.named_parameters()}
    seen: list[dict[str, torch.Tensor]] = []
    drawn: list[float] = []

    def environment(_: Any) -> float:
        seen.append({name: value.detach() - start[name] for name, value in policy.named_parameters()})
        seen[-1] = {name: value.clone() / 0.1 for name, value in seen[-1].items()}
        drawn.append(float(torch.rand(())))
        return float((seen[-1]["readout.bias"] ** 3).sum())

    history = model.evolve(1, environment, noise_population_size=4, noise_scale=0.1, learning_rate=0.02).view(-1)
    assert len(set(drawn)) == 1
    scores = ((history - history.mean()) / (history.std(correction=0) + 1e-3)).double()
    for name, value in policy.named_parameters():
        assert torch.allclose(seen[0][name], -seen[1][name])
        estimate = sum(score * noise[name] for score, noise in zip(scores, seen, strict=True)) / len(seen)
        gradient = 0.01 * start[name] - estimate / 0.1
        torch.testing.assert_close(value.detach(), start[name] - 0.02 * 1.1 * gradient)  # Nesterov's first step


def test_the_environment_sees_the_model_with_a_noisy_policy_and_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    seen: list[tuple[bool, float]] = []

    def environment(handed: Any) -> float:
        seen.append((handed is model, float(first_code(handed).detach().sum())))
        return 0.0

    model.evolve(1, environment, noise_population_size=3)
    assert len(seen) == 6
    assert all(same for same, _ in seen)
    assert len({code for _, code in seen}) == 6
    assert capfd.readouterr() == ("", "")


def test_training_goes_on_after_evolution() -> None:
    model = make_model()
    model.evolve(1, fitness, noise_population_size=2)
    states, actions = torch.randn(2, 6, 2), torch.randint(0, 3, (2, 6))
    model(states, actions).action.backward()
    _, action_recon, kl, _ = model(states, actions, discovery_phase=True)
    (action_recon + kl).backward()


def test_an_environment_that_fails_leaves_the_policy_as_it_was() -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def environment(_: Any) -> float:
        raise RuntimeError("the simulator is gone")

    with pytest.raises(RuntimeError, match="simulator"):
        model.evolve(1, environment)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor(float("nan"))], ids=str)
def test_a_fitness_that_is_not_finite_stops_evolution_and_restores_the_policy(bad: Any) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = iter([0.5, 0.25, bad])
    with pytest.raises(DivergedError, match=r"diverged at member 3: the fitness is .*(nan|inf)"):
        model.evolve(2, lambda _: next(values), noise_population_size=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evolution_stops_at_weights_that_are_not_finite() -> None:
    model = make_model()
    with pytest.raises(DivergedError, match=r"the parameter .* is not finite"):
        model.evolve(2, lambda _: 1.0, noise_population_size=2, noise_scale=3e38)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_what_is_missing_or_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.meta_controller is None; set it"):
        make_model(steered=False).evolve(1, fitness)
    with pytest.raises(ValueError, match="num_generations is 0"):
        make_model().evolve(0, fitness)
    for options in ({"noise_scale": 0.0}, {"noise_population_size": 0}, {"noise_low_rank": 0}, {"learning_rate": -1.0}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
            make_model().evolve(1, fitness, **options)
