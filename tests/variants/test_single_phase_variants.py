"""Options of the single-phase model, each against a slow version: switches by entropy, summaries, the next switch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_single_phase import DIM, batch, make

from metacontroller.errors import UserError
from metacontroller.variants.latent_prediction import LatentPrediction, NextSwitch, sigreg
from metacontroller.variants.switches import EntropySwitch


@pytest.mark.parametrize("weights", [None, [0.25, 2.0]])
def test_the_entropy_is_that_of_each_prediction(weights: list[float] | None) -> None:
    latents = LatentPrediction(3, ahead=2).double()
    residual = torch.randn(2, 5, 3, dtype=torch.float64)
    found = latents.entropy(residual, weights)
    assert not found.requires_grad
    for row in range(2):
        for t in range(5):
            total = 0.0
            log_std = latents.readout(residual[row, t]).chunk(2, -1)[1].view(3, 2).detach()
            for ahead, weight in enumerate(weights or [1.0, 0.5]):
                deviations = log_std[:, ahead].exp()
                total += weight * float(torch.distributions.Normal(0.0, deviations).entropy().sum())
            assert math.isclose(float(found[row, t]), total, rel_tol=1e-9)


def test_an_entropy_switch_takes_each_episodes_quantile_and_follows_the_batch() -> None:
    switch = EntropySwitch(DIM, (0.25, 0.75), evaluated=0.75, rate=0.5).double()
    switch.running.copy_(torch.tensor([1.0, 2.0]))
    entropy = torch.tensor([[0.5, 1.5, 2.5], [0.5, 1.5, 2.5]], dtype=torch.float64)
    assert switch(entropy, torch.tensor([0, 1])).tolist() == [[0, 1, 1], [0, 0, 1]]
    mask = torch.tensor([[True, True, True], [True, False, False]])
    switch.follow(entropy, mask)
    values = sorted([0.5, 1.5, 2.5, 0.5])
    expected = [values[0], values[2] + 0.25 * (values[3] - values[2])]  # linear between the values of rank 0.75 (4 - 1)
    torch.testing.assert_close(switch.running.tolist(), [(1.0 + expected[0]) / 2, (2.0 + expected[1]) / 2])
    before = switch.running.clone()
    switch.eval().follow(entropy)
    assert switch.choose(4).tolist() == [1, 1, 1, 1]
    switch.train().frozen = True
    switch.follow(entropy)
    assert switch.choose(4).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(switch.running, before)
    switch.follow(entropy + 1.0, update=True)
    assert (switch.running != before).all()
    switch.frozen = False
    assert set(switch.choose(64).tolist()) == {0, 1}


def test_switches_by_entropy_act_from_the_cache_as_over_episodes() -> None:
    model = make(entropy_quantiles=(0.3, 0.6), entropy_options={"evaluated": 0.6})
    states, actions = batch()
    with torch.no_grad():
        entropy = model.steer(model.model.residual(states, actions), update=False)[1].entropy
        model.entropy_switch.running.copy_(torch.quantile(entropy, torch.tensor([0.3, 0.6], dtype=torch.float64)))
    losses, output = model.losses(states, actions)
    assert 1 < float(output.switch_beta.sum()) / 3 < 7
    torch.stack(list(losses)).sum().backward()
    assert model.entropy_switch.embedding.weight.grad is not None
    assert model.entropy_switch.embedding.weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        whole, output = model.act(states, actions[:, :-1], temperature=0.0)
        cache, parts, gates = model.empty_cache(3, capacity=2), [], []
        for start, end in ((0, 3), (3, 4), (4, 7)):
            past = actions[:, max(start - 1, 0) : end - 1]
            logits, steered = model.act(states[:, start:end], past, cache, temperature=0.0)
            parts.append(logits)
            gates.append(steered.switch_beta)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(torch.cat(gates, 1), output.switch_beta)
    expected = (output.entropy > model.entropy_switch.running[1]).double()
    expected[:, 0] = 1
    torch.testing.assert_close(output.switch_beta, expected)
    torch.testing.assert_close(
        model.action_dist(output.residual, output.switch_beta, output.quantile), output.action_dist
    )


def test_the_summary_reaches_the_switch_of_real_steps_where_it_learns_and_not_where_it_acts() -> None:
    model = make(sequence_embedder={"depth": 1, "heads": 2}, dim_sequence=3)
    states, actions = batch()
    lengths = torch.tensor([7, 4, 4])
    with torch.no_grad():
        output = model.losses(states, actions, lengths)[1]
        mask = torch.arange(7) < lengths[:, None]
        assert model.sequence_embedder is not None
        summary = model.from_sequence(model.sequence_embedder(output.residual, mask))[:, None]
        assert model.switch is not None
        torch.testing.assert_close(output.probability, model.switch(output.residual + summary)[0])
        padded = states.clone()
        padded[1:, 4:] = 5.0
        other = model.losses(padded, actions, lengths)[1]
        torch.testing.assert_close(other.probability[1:, :4], output.probability[1:, :4])
        acting = model.act(states, actions[:, :-1])[1]
        torch.testing.assert_close(acting.probability, model.switch(acting.residual)[0])
        model.sequence_share = 0.0
        alone = model.losses(states, actions, lengths)[1]
        torch.testing.assert_close(alone.probability, model.switch(alone.residual)[0])


def test_the_next_switch_is_predicted_from_the_one_before_it_in_the_same_episode() -> None:
    predictor = NextSwitch(DIM).double()
    emitted, residual = (torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True) for _ in range(2))
    switched = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 0, 1]]).bool()
    pairs = [(0, 0, 2), (0, 2, 3), (1, 0, 4)]
    slow = torch.stack(
        [(predictor.linear(emitted[row, a]) - residual[row, b].detach()).abs().mean() for row, a, b in pairs]
    ).mean()
    fast = predictor.loss(emitted, residual, switched)
    torch.testing.assert_close(fast, slow)
    inputs = [emitted, *predictor.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(fast, inputs, retain_graph=True), torch.autograd.grad(slow, inputs, retain_graph=True)
    )
    fast.backward()
    assert residual.grad is None
    assert predictor.loss(emitted, residual, switched & False).tolist() == 0
    model = make(predict_switches=True)
    losses, _ = model.losses(*batch())
    losses.next_switch.backward()
    assert model.next_switch is not None
    assert model.next_switch.linear.weight.grad is not None
    assert float(make().losses(*batch())[0].next_switch) == 0


def test_dropped_episodes_leave_the_code_alone() -> None:
    model = make(drop_episodes=1.0)
    residual = torch.randn(3, 4, DIM, dtype=torch.float64)
    steered, output = model.steer(residual)
    torch.testing.assert_close(steered, model.steered_norm(output.control))
    steered, output = model.eval().steer(residual)
    torch.testing.assert_close(steered, model.steered_norm(residual + output.control))


def test_wrong_options_are_named() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"entropy_quantiles": (0.5, 1.0)}, "between 0 and 1"),
        ({"entropy_quantiles": (0.4,)}, "the evaluated quantile is 0.5"),
        ({"entropy_quantiles": (0.5,), "entropy_options": {"rate": 0.0}}, "rate of the running quantiles is 0.0"),
        ({"ahead_weights": [1.0]}, "expected 2"),
        ({"sequence_share": 1.5}, "sequence_share is 1.5"),
        ({"drop_episodes": -0.5}, "drop_episodes is -0.5"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            make(**options)
    with pytest.raises(UserError, match="points is 1"):
        sigreg(torch.zeros(2, 3), torch.ones(1, 3), points=1)
