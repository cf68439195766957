"""A population in one batch: the same numbers as one member after another, and the gradient of its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call

from metacontroller.control.policy import AbstractActionPolicy
from metacontroller.control.population import Population
from metacontroller.errors import UserError
from metacontroller.variants.proposers import StepwisePolicy, make_proposer

MEMBERS, DIM = 6, 5


def make(kind: Any = "gru", rank: int = 2) -> tuple[AbstractActionPolicy, Population]:
    policy = AbstractActionPolicy(DIM, 3, hidden=8, kind=kind).double()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return policy, Population(policy, MEMBERS, scale=0.3, rank=rank)


@pytest.mark.parametrize(("kind", "rank"), [("gru", 1), ("gru", 3), ("hawk", 2)])
def test_a_batch_of_members_equals_each_member_alone(kind: str, rank: int) -> None:
    policy, population = make(kind, rank)
    member = torch.tensor([0, 1, 1, 5, 4, 2, 3, 0])
    state = alone = policy.initial_state(len(member))
    rows = [torch.randn(len(member), 1, DIM, dtype=torch.float64) for _ in range(3)]
    for residual in rows:
        together, state = population(residual, state, member)
        one_by_one = [
            functional_call(policy, population.weights(int(m)), (residual[[i]], alone[[i]]))
            for i, m in enumerate(member)
        ]
        torch.testing.assert_close(together, torch.cat([out for out, _ in one_by_one]))
        alone = torch.cat([after for _, after in one_by_one])
        torch.testing.assert_close(state, alone)
    assert (together[0] - together[1]).abs().max() > 1e-3  # members differ


@pytest.mark.parametrize("kind", ["gru", "hawk"])
def test_the_gradient_is_the_mean_of_scores_times_perturbations(kind: str) -> None:
    policy, population = make(kind)
    scores = torch.randn(MEMBERS, dtype=torch.float64)
    estimate = population.gradient(scores)
    assert (
        {"norm.weight", "readout.weight", "readout.bias"} <= estimate.keys() <= dict(policy.named_parameters()).keys()
    )
    for name, parameter in policy.named_parameters():
        differences = torch.stack([population.weights(m)[name] - parameter for m in range(MEMBERS)]).detach()
        slow = torch.einsum("m,m...->...", scores, differences / 0.3) / MEMBERS
        torch.testing.assert_close(estimate.get(name, torch.zeros_like(slow)), slow)


def test_perturbations_have_their_rank_unit_variance_and_opposite_signs() -> None:
    policy = AbstractActionPolicy(64, 3, hidden=64)
    population = Population(policy, 2, scale=1.0, rank=4, generator=torch.Generator().manual_seed(0))
    name = "recurrence.weight_ih_l0"
    plus, minus = (population.weights(m)[name] - policy.get_parameter(name).detach() for m in (0, 1))
    torch.testing.assert_close(plus, -minus, atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(plus.double(), rtol=1e-4) == 4
    assert plus.std() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 3}, "members is 3; expected an even number"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"policy": StepwisePolicy(make_proposer(DIM, "mlp"), DIM, 6)}, "reads every step"),
    ],
)
def test_wrong_populations_are_named(options: dict[str, Any], message: str) -> None:
    settings = {"policy": AbstractActionPolicy(DIM, 3, hidden=8), "members": 2, "scale": 0.1, **options}
    with pytest.raises(UserError, match=message):
        Population(settings.pop("policy"), settings.pop("members"), **settings)
