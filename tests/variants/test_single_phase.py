"""The single-phase model and its parts against their definitions, step by step, in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.errors import UserError
from metacontroller.models.readouts import gaussian_log_prob
from metacontroller.variants.latent_prediction import LatentPrediction, sigreg
from metacontroller.variants.single_phase import SinglePhase
from metacontroller.variants.switches import SimilaritySwitch, confidence, hard_switch

BODY = {"depth": 1, "heads": 2}
DIM, ACTIONS, STATE = 8, 3, 2


def make(continuous: bool = False, **options: Any) -> SinglePhase:
    model = SinglePhase(
        DIM,
        state_embed_readout={"num_continuous": STATE},
        action_embed_readout={"num_continuous": ACTIONS} if continuous else {"num_discrete": ACTIONS},
        lower_body=BODY,
        upper_body=BODY,
        emitter=BODY,
        **{"bits": 2, "switch_width": 8, "directions": 4, "target_length": 3.0, **options},
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def batch(steps: int = 7, continuous: bool = False, extra: int = 0) -> tuple[Tensor, Tensor]:
    states = torch.randn(3, steps + extra, STATE, dtype=torch.float64)
    if continuous:
        return states, torch.randn(3, steps, ACTIONS, dtype=torch.float64)
    return states, torch.randint(ACTIONS, (3, steps))


def test_the_switch_is_that_of_its_definition_and_ignores_the_future() -> None:
    switch = SimilaritySwitch(DIM, width=5).double()
    residual = torch.randn(2, 6, DIM, dtype=torch.float64)
    probability, last = switch(residual)
    query_weight, key_weight = switch.to_queries_and_keys.weight.chunk(2)
    for row in range(2):
        read = F.layer_norm(residual[row], (DIM,))
        assert probability[row, 0] == 1
        for t in range(1, 6):
            q, k = query_weight @ read[t], key_weight @ read[t - 1]
            cosine = (q * k).sum() / (q.square().sum().sqrt() * k.square().sum().sqrt())
            torch.testing.assert_close(probability[row, t], (1 - cosine) / 2)
    first, key = switch(residual[:, :4])
    rest, end = switch(residual[:, 4:], key)
    torch.testing.assert_close(torch.cat([first, rest], 1), probability)
    torch.testing.assert_close(end, last)


def test_switch_and_confidence_are_hard_with_soft_gradients() -> None:
    probability = torch.tensor([[1.0, 0.2, 0.5, 0.8]], dtype=torch.float64, requires_grad=True)
    gate, sure = hard_switch(probability), confidence(probability)
    assert gate.tolist() == [[1, 0, 1, 1]]
    assert sure.tolist() == [[1, 1, 1, 1]]
    assert torch.autograd.grad(gate.sum(), probability)[0].tolist() == [[1, 1, 1, 1]]
    assert torch.autograd.grad(sure.sum(), probability)[0].tolist() == [[1, -1, 1, 1]]


@pytest.mark.parametrize("ahead", [1, 3])
def test_latent_prediction_equals_a_loop_and_its_targets_get_no_gradient(ahead: int) -> None:
    latents = LatentPrediction(DIM, ahead=ahead).double()
    residual = torch.randn(2, 6, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    terms = []
    for row, length in enumerate((6, 4)):
        for t in range(length - ahead):
            target = torch.stack([residual[row, t + i + 1].detach() for i in range(ahead)], -1).flatten()
            terms.append(-gaussian_log_prob(latents.readout(residual[row, t]), target).mean())
    fast, slow = latents.loss(residual, mask), torch.stack(terms).mean()
    torch.testing.assert_close(fast, slow)
    inputs = [residual, *latents.parameters()]
    torch.testing.assert_close(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs))
    assert float(latents.loss(residual[:, :ahead], mask[:, :ahead])) == 0


def test_sigreg_equals_the_integral_over_complex_exponentials() -> None:
    vectors = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(5, 3, dtype=torch.float64)
    points, total = torch.linspace(-5, 5, 17, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for direction in directions:
        x = vectors @ (direction / direction.norm())
        values = []
        for s in points.tolist():
            found = torch.exp(1j * s * x).mean()
            values.append((found - math.exp(-(s**2) / 2)).abs().square() * math.exp(-(s**2) / 2))
        total = total + sum((a + b) / 2 * (10 / 16) for a, b in pairwise(values)) / 5
    fast = sigreg(vectors, directions)
    torch.testing.assert_close(fast, total)
    torch.testing.assert_close(torch.autograd.grad(fast, vectors), torch.autograd.grad(total, vectors))
    assert sigreg(vectors * 0, directions) > 5 * fast  # collapsed


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 4, 2])])
def test_losses_equal_each_episode_alone(continuous: bool, lengths: Tensor | None) -> None:
    model = make(continuous, free_bits=0.1)
    states, actions = batch(continuous=continuous, extra=1)
    losses, output = model.losses(states, actions, lengths)
    rows = [7, 7, 7] if lengths is None else lengths.tolist()
    state, action, kl, latent, control, p, hard = ([] for _ in range(7))
    for row, length in enumerate(rows):
        one, act = states[[row], : length + 1], actions[[row], :length]
        e = model.model.lower(model.model.embed(one[:, :-1], act[:, :-1]))
        probability, _ = model.switch(e)  # pyright: ignore[reportOptionalCall]
        code, z, u = output.actions[[row]], torch.zeros(4, dtype=torch.float64), []
        for t in range(length):
            z = code[0, t] if probability[0, t] >= 0.5 else z
            u.append(model.to_control.weight @ z)
        u = torch.stack(u)[None]
        hidden = model.model.upper(F.layer_norm(e + u, (DIM,), model.steered_norm.weight, model.steered_norm.bias))
        readout, state_readout = model.model.action_readout, model.model.state_readout
        action.append(-readout.log_prob(readout(hidden), act)[0])
        state.append(-state_readout.log_prob(state_readout(hidden), one[:, 1:])[0])
        logits = model.to_logits(
            model.emitter_norm(model.emitter(e + model.switch_embedding((probability >= 0.5).long())))
        )
        bit = torch.sigmoid(logits)
        entropy = -(bit * bit.log() + (1 - bit) * (1 - bit).log()).sum(-1)
        kl.append((2 * math.log(2) - entropy - 0.1 * math.log(2)).clamp_min(0)[0])
        switches = probability[0] >= 0.5
        control.append(F.relu(e[0].norm(dim=-1) / u[0].norm(dim=-1) - 0.5)[switches])
        p.append(probability[0])
        hard.append(switches.double())
        if length > 2:
            following = e[:, 1:].detach().unfold(1, 2, 1).flatten(2)
            latent.append(-gaussian_log_prob(model.latents.readout(e[:, :-2]), following).mean(-1)[0])
    share, soft = torch.cat(hard).mean(), torch.cat(p).mean()
    ratio = 3 / 2 * (2 * share * soft + (1 - share) * (1 - soft))
    slow = [torch.cat(terms).mean() for terms in (state, action, kl)] + [ratio, torch.cat(latent).mean()]
    found = losses.state, losses.action, losses.kl, losses.ratio, losses.latent
    torch.testing.assert_close(found, tuple(slow))
    torch.testing.assert_close(losses.control, torch.cat(control).mean())
    torch.testing.assert_close(
        torch.autograd.grad(losses.latent, model.latents.readout.linear.weight, retain_graph=True),
        torch.autograd.grad(slow[4], model.latents.readout.linear.weight, retain_graph=True),
    )
    torch.stack(list(losses)).sum().backward()
    silent = [name for name, value in model.named_parameters() if value.grad is None]
    assert silent == []


@pytest.mark.parametrize("continuous", [False, True])
def test_a_whole_episode_equals_its_parts_from_the_cache(continuous: bool) -> None:
    model = make(continuous).eval()
    states, actions = batch(continuous=continuous)
    with torch.no_grad():
        whole, output = model.act(states, actions[:, :-1], temperature=0.0)
        cache, parts, gates = model.empty_cache(3, capacity=2), [], []
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 7)):
            past = actions[:, max(start - 1, 0) : end - 1]
            logits, steered = model.act(states[:, start:end], past, cache, temperature=0.0)
            parts.append(logits)
            gates.append(steered.switch_beta)
        assert cache.steps == 7
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(torch.cat(gates, 1), output.switch_beta)
        changed = states.clone()
        changed[:, 4:] += 1.0
        other, _ = model.act(changed, actions[:, :-1], temperature=0.0)
    torch.testing.assert_close(other[:, :4], whole[:, :4])
    assert (other[:, 4:] - whole[:, 4:]).abs().max() > 1e-4


def test_it_is_saved_and_wrong_values_are_named(tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "model.safetensors")
    again = SinglePhase.init_and_load(tmp_path / "model.safetensors")
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    wrong: dict[str, Any] = {"target_length": 1.0, "directions": 0, "ahead": 0}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"{name} is {value}"):
            make(**{name: value})
