"""Module calls over any number of steps: against discovery, step by step, and slow recurrences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metacontroller.control.discovery_losses import auxiliary_ratio_loss, kl_loss
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.sequence_embedder import KINDS, SequenceEmbedder
from metacontroller.control.switching import mix_given, regular_switches
from metacontroller.errors import UserError
from metacontroller.variants.loss_weights import LossWeights
from metacontroller.variants.proposers import MinGruProposer, StepwisePolicy, make_proposer
from metacontroller.variants.sequence_embedders import LastState

BATCH, TIME, WIDTH, CODE = 3, 7, 8, 2
LENGTHS = torch.tensor([7, 4, 1])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_steering(proposer: Any = None, **options: Any) -> MetaController:
    steering = MetaController(WIDTH, dim_meta_controller=8, dim_latent=CODE, rank=2, **options)
    if proposer is not None:
        steering.policy = StepwisePolicy(make_proposer(WIDTH, proposer), WIDTH, steering.codes.params)
    for name, parameter in steering.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.5)
    return steering.double()


def test_a_call_in_discovery_is_discover() -> None:
    steering, residual = make_steering(ratio_loss_weight=0.5), random(BATCH, TIME, WIDTH)
    torch.manual_seed(3)
    expected = steering.discover(residual, LENGTHS)
    torch.manual_seed(3)
    control, output = steering(residual, discovery_phase=True, episode_lens=LENGTHS)
    torch.testing.assert_close(residual + control, expected.steered)
    torch.testing.assert_close((output.z, output.switch_beta), (expected.z, expected.gate))
    torch.testing.assert_close(output.kl_loss, kl_loss(expected))
    torch.testing.assert_close(output.ratio_loss, auxiliary_ratio_loss(steering, expected))
    parameters = steering.discovery_parameters()
    losses = (residual + control).square().sum(), expected.steered.square().sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters) for loss in losses))


@pytest.mark.parametrize("proposer", [None, "attention", "gru", "mingru", "hawk", "mlp"])
def test_acting_in_pieces_is_acting_at_once(proposer: str | None) -> None:
    steering, residual = make_steering(proposer), random(BATCH, TIME, WIDTH)
    whole, output = steering(residual, temperature=0.0)
    parts, cache, start = [], None, 0
    for steps in (3, 1, 1, 2):
        control, cache = steering(residual[:, start : start + steps], cache, temperature=0.0)
        parts.append(control)
        start += steps
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache is not None
    torch.testing.assert_close(cache.state.steps_since_switch, output.state.steps_since_switch)
    torch.testing.assert_close(cache.state.z, output.state.z)
    if proposer is not None:  # what the policy says does not depend on the gate
        torch.testing.assert_close(steering.policy(residual)[0], output.action_dist)
        with pytest.raises(UserError, match="reads every step"):
            steering.initial_state(2)


def test_a_call_of_one_step_is_act() -> None:
    steering, residual = make_steering(), random(BATCH, TIME, WIDTH)
    state = cache = None
    for t in range(TIME):
        torch.manual_seed(t)
        steered, acted = steering.act(residual[:, t : t + 1], state)
        torch.manual_seed(t)
        control, cache = steering(residual[:, t : t + 1], cache)
        state = acted.state
        torch.testing.assert_close(residual[:, t : t + 1] + control, steered)
        torch.testing.assert_close(cache.action_dist, acted.action_dist)


GATES: list[Any] = [
    {"mode": "soft"},
    {"mode": "hard", "threshold": 0.4},
    {"mode": "straight-through", "threshold": 0.6},
    {"mode": "gumbel-sigmoid", "temperature": 0.5},
    {"mode": "forced"},
    {"mode": "fixed-frequency", "period": 3},
]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate["mode"])
def test_a_call_in_discovery_uses_the_gate_as_discover_does(gate: Any) -> None:
    steering, residual = make_steering(gate=gate), random(BATCH, TIME, WIDTH)
    torch.manual_seed(7)  # in training, so with the noise of the Gumbel-sigmoid
    expected = steering.discover(residual)
    torch.manual_seed(7)
    control, output = steering(residual, discovery_phase=True)
    torch.testing.assert_close(residual + control, expected.steered)
    values = (output.z, output.switch_beta, output.action_dist)
    torch.testing.assert_close(values, (expected.z, expected.gate, expected.distribution))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate["mode"])
def test_a_call_that_acts_uses_the_gate_as_act_does_in_any_number_of_steps(gate: Any) -> None:
    steering, residual = make_steering(gate=gate), random(BATCH, TIME, WIDTH)
    torch.manual_seed(7)
    state, steered, codes, switches = None, [], [], []
    for t in range(TIME):
        out, acted = steering.act(residual[:, t : t + 1], state)
        state = acted.state
        steered.append(out)
        codes.append(acted.actions)
        switches.append(acted.switch_beta >= steering.gate_config.threshold)
    torch.manual_seed(7)
    control, output = steering(residual)
    torch.testing.assert_close(residual + control, torch.cat(steered, 1))
    torch.testing.assert_close(output.z, torch.cat(codes, 1))
    assert torch.equal(output.switch_beta, torch.cat(switches, 1).double())
    assert bool((output.switch_beta == 1).all()) == (gate["mode"] == "forced")


def test_given_weights_mix_codes_step_by_step() -> None:
    proposed, beta, z = (
        random(BATCH, TIME, CODE).requires_grad_(),
        torch.rand(BATCH, TIME).double(),
        random(BATCH, CODE),
    )
    fast = mix_given(proposed, beta, z).z
    codes = []
    for t in range(TIME):
        z = beta[:, t, None] * proposed[:, t] + (1 - beta[:, t, None]) * z
        codes.append(z)
    slow = torch.stack(codes, 1)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(v.square().sum(), proposed)[0] for v in (fast, slow)))
    assert regular_switches(2, 5, 3, offset=1).tolist() == [[0, 1, 0, 0, 1]] * 2
    with pytest.raises(UserError, match="at least 1 step"):
        regular_switches(2, 5, 0)
    with pytest.raises(UserError, match="ablate_switch_beta has shape"):
        make_steering()(random(BATCH, TIME, WIDTH), discovery_phase=True, ablate_switch_beta=torch.ones(BATCH, 2))


def test_settings_of_a_call() -> None:
    steering, residual = make_steering(), random(BATCH, TIME, WIDTH)
    torch.manual_seed(0)
    soft = steering(residual, discovery_phase=True)[1]
    hard = steering(residual, discovery_phase=True, hard_switch=True)[1].switch_beta
    assert set(hard.unique().tolist()) <= {0.0, 1.0}
    passing = steering(residual, discovery_phase=True, hard_switch=True, hard_switch_straight_through=True)[0]
    assert float(torch.autograd.grad(passing.sum(), steering.switching.out.weight)[0].abs().sum()) > 0
    steering.code_bound, steering.switch_temperature = 0.5, 3.0
    torch.manual_seed(0)
    bound = steering(residual, discovery_phase=True)[1]
    torch.testing.assert_close(bound.actions, soft.actions)
    assert float(bound.z.detach().abs().max()) <= 0.5 < float(soft.actions.detach().abs().max())
    torch.testing.assert_close(bound.z[:, 0], 0.5 * torch.tanh(soft.actions[:, 0] / 0.5))
    read = steering.norm(residual[:, :2])
    history = torch.cat([read.new_zeros(BATCH, 1, 8), steering.history(read)[0][:, :1]], 1)
    drive = steering.switching.drive(torch.cat([read, history], -1))[:, 1]
    logit = steering.switching.out(torch.relu(drive + steering.switching.code(bound.z[:, 0])))[:, 0]
    torch.testing.assert_close(bound.switch_beta[:, 1], torch.sigmoid(logit / 3))


def test_mingru_is_its_recurrence() -> None:
    unit, x, state = MinGruProposer(4).double(), random(2, 5, 4), random(2, 4)
    h, steps = state, []
    for t in range(5):
        u, c = (x[:, t] @ unit.update_and_candidate.weight.T + unit.update_and_candidate.bias).chunk(2, -1)
        h = (1 - torch.sigmoid(u)) * h + torch.sigmoid(u) * c
        steps.append(h)
    fast, slow = unit(x, state)[0], torch.stack(steps, 1)
    torch.testing.assert_close(fast, slow)
    weights = list(unit.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(v.square().sum(), weights) for v in (fast, slow)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_sequence_embedders_know_what_they_may(kind: Any, pooled: bool) -> None:
    embedder = SequenceEmbedder(WIDTH, 3, dim=8, heads=2, kind=kind, pooled=pooled).double()
    for parameter in embedder.parameters():
        nn.init.normal_(parameter, std=0.5)
    residual, mask = random(1, TIME, WIDTH).requires_grad_(), torch.arange(TIME)[None] < 5
    out = embedder(residual, mask)
    assert out.shape == ((1, 3) if pooled else (1, TIME, 3))
    (gradient,) = torch.autograd.grad((out if pooled else out[:, 2]).square().sum(), residual)
    seen = gradient[0].abs().sum(-1) > 0
    known = 5 if pooled or kind == "attention" else 3
    assert seen.tolist() == [True] * known + [False] * (TIME - known)
    steering = make_steering()
    steering.sequence_embedder = SequenceEmbedder(WIDTH, 8, dim=8, heads=2, kind=kind, pooled=pooled).double()
    assert steering.discover(random(BATCH, TIME, WIDTH), LENGTHS).steered.shape == (BATCH, TIME, WIDTH)


def test_the_last_state_is_that_of_the_episode_alone() -> None:
    embedder, x = LastState(4), torch.randn(3, TIME, 4)
    out = embedder(x, episode_lens=LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(out[b], embedder.gru(x[b : b + 1, :length])[1][0].expand(TIME, -1))
    torch.testing.assert_close(embedder(x, mask=torch.arange(TIME) < LENGTHS[:, None]), out)


def test_weights_of_losses_rise_and_fall_and_are_saved() -> None:
    weights = LossWeights(kl=0.2, kl_warmup=4, ratio=4.0, ratio_final=1.0, ratio_warmdown=2)
    seen = []
    for _ in range(6):
        seen.append((round(weights.current_kl, 6), weights.current_ratio))
        weights.step()
    assert seen == [(0.0, 4.0), (0.05, 2.5), (0.1, 1.0), (0.15, 1.0), (0.2, 1.0), (0.2, 1.0)]
    again = LossWeights(kl=0.2, kl_warmup=12)
    again.load_state_dict(weights.state_dict())
    assert again.current_kl == pytest.approx(0.1)
    assert LossWeights(kl=0.2, apply_kl=False).applied_kl == 1.0
    with pytest.raises(UserError, match="kl_warmup is -1"):
        LossWeights(kl_warmup=-1)


def test_a_deeper_hypernetwork_is_its_layers() -> None:
    steering = make_steering(decoder_depth=3)
    controller: Any = steering.controller
    z, e = random(4, CODE), random(4, WIDTH)
    hidden = torch.relu(controller.code_to_hidden(z))
    assert controller.deeper is not None
    for layer in controller.deeper:
        hidden = torch.relu(hidden @ layer.weight.T + layer.bias)
    torch.testing.assert_close(controller.hidden(z), torch.cat([hidden, torch.ones(4, 1).double()], -1))
    torch.testing.assert_close(controller(z, e), torch.einsum("boi,bi->bo", controller.matrix(z), e))
