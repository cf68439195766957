"""One core of steering: T steps at once are T calls of one step and chunks of any size, whoever proposes and however
the gate is used; values and gradients in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metacontroller.control import core
from metacontroller.control.core import Proposal, Proposer
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.parameter_groups import fixed_gate
from metacontroller.variants.proposers import StepwisePolicy, make_proposer

BATCH, TIME, WIDTH, CODE = 4, 5, 8, 2
PARTS = ((TIME,), (1,) * TIME, (1, 2, 2))
GATES: list[Any] = [
    {"mode": "soft"},
    {"mode": "hard", "threshold": 0.4},
    {"mode": "straight-through", "threshold": 0.6},
    {"mode": "gumbel-sigmoid", "temperature": 0.5},
    {"mode": "forced"},
    {"mode": "fixed-frequency", "period": 3},
]
CODES: list[Any] = ["gaussian", "binary"]
REMEMBERING = ("attention", "hawk")
"""Policies that read every step and keep numbers of former steps: no gradient goes back to a former call."""
PROPOSERS = ["encoder", "given", "gru at switches", "hawk at switches", "attention", "gru", "mingru", "hawk", "mlp"]
by_mode: Any = pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate["mode"])


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_steering(proposer: str = "encoder", **options: Any) -> MetaController:
    """Float64, with weights large enough that the gate opens and shuts and codes matter."""
    kind: Any = {"policy_kind": "hawk"} if proposer == "hawk at switches" else {}
    steering = MetaController(WIDTH, dim_meta_controller=8, dim_latent=CODE, rank=2, **kind, **options)
    if proposer in ("attention", "gru", "mingru", "hawk", "mlp"):
        body: Any = make_proposer(WIDTH, proposer)  # pyright: ignore[reportArgumentType]
        steering.policy = StepwisePolicy(body, WIDTH, steering.codes.params)
    for name, parameter in steering.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2 if name.startswith("policy") else 0.4)
    nn.init.normal_(steering.switching.out.weight, std=2.0)
    nn.init.constant_(steering.switching.out.bias, -0.5)
    steering.sequence_embedder = Nothing()
    return steering.double()


class Nothing(nn.Module):
    """An embedding that says nothing, so that the encoder sees no step but its own and those before."""

    def forward(self, residual: Tensor, mask: Tensor) -> Tensor:
        return residual.new_zeros(len(residual), 8)


class Data:
    """A batch, noise of codes (b, t, ..) and gate (b, t), and codes to be given."""

    def __init__(self, steering: MetaController) -> None:
        self.residual, self.uniform = random(BATCH, TIME, WIDTH), torch.rand(BATCH, TIME).double()
        self.noise = random(BATCH, TIME, steering.codes.noise_dim)
        self.codes = random(BATCH, TIME, steering.dim_latent)


def steer(steering: MetaController, name: str, parts: tuple[int, ...], data: Data) -> tuple[list[Tensor], Any, Any]:
    """Spans of so many steps each: what they return, joined, the last state, and gradients of all that learns."""
    acting, sample = name not in ("encoder", "given"), type(steering.codes).sample
    sampled = 0

    def with_noise(distribution: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal sampled
        sampled += distribution.shape[1]
        now = slice(sampled - distribution.shape[1], sampled)
        return sample(steering.codes, distribution, noise=data.noise[:, now])  # pyright: ignore[reportArgumentType]

    steering.codes.sample = with_noise
    state, spans, start = core.initial_state(steering, BATCH), [], 0
    for steps in parts:
        now = slice(start, start + steps)
        proposer = core.policy(steering)
        if name == "encoder":
            proposer = core.encoder(steering, data.residual[:, now], torch.full((BATCH,), steps))
        elif name == "given":
            codes = data.codes[:, now]
            proposer = Proposer(lambda reading, state, switch, codes=codes: Proposal(codes, codes, state))
        gate = core.GateUse(core.gate_of_call(steering, discovery=not acting), data.uniform[:, now])
        span = core.steer_span(steering, data.residual[:, now], state, proposer, gate)
        state, start = span.state, start + steps
        spans.append(span[:-1])
    values = [torch.cat(values, 1) for values in zip(*spans, strict=True)]
    if not torch.is_grad_enabled():
        return values, state, {}
    loss = values[0].square().sum() + values[1].square().sum() + state.z.square().sum()
    learned = {name: value for name, value in steering.named_parameters() if value.requires_grad}
    slopes = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    named = dict(zip(learned, slopes, strict=True))
    return values, state, {name: slope for name, slope in named.items() if slope is not None and bool(slope.any())}


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("code", CODES)
@by_mode
def test_steps_at_once_are_steps_one_by_one_and_in_chunks(gate: Any, code: Any, name: str) -> None:
    torch.manual_seed(4)  # every gate opens and shuts
    steering = make_steering(name, gate=gate, code=code)
    data, acting = Data(steering), name not in ("encoder", "given")
    with torch.set_grad_enabled(name not in REMEMBERING):
        (values, state, slopes), *others = (steer(steering, name, parts, data) for parts in PARTS)
    for other in others:
        torch.testing.assert_close((other[0], other[2]), (values, slopes))
        for field in ("history", "z", "steps_since_switch"):
            torch.testing.assert_close(getattr(other[1], field), getattr(state, field))
    weight = values[2].detach()
    numbers = set(weight.unique().tolist())
    assert bool((weight[:, 0] == 1).all())
    assert (numbers <= {0.0, 1.0}) == (acting or gate["mode"] not in ("soft", "gumbel-sigmoid"))
    assert (numbers == {1.0}) == (gate["mode"] == "forced")
    if gate["mode"] == "fixed-frequency":
        assert weight.tolist() == [[1, 0, 0, 1, 0]] * BATCH
    learns = gate["mode"] == "straight-through" or (not acting and gate["mode"] in ("soft", "gumbel-sigmoid"))
    assert ("switching.out.bias" in slopes) == (learns and name not in REMEMBERING)


@pytest.mark.parametrize("fixed", [False, True])
@by_mode
def test_one_step_is_its_equations(gate: Any, fixed: bool) -> None:
    steering, e = make_steering(gate=gate), random(BATCH, 1, WIDTH)
    before = core.initial_state(steering, BATCH)
    before.history, before.z, before.steps_since_switch = (
        random(BATCH, 8),
        random(BATCH, CODE),
        torch.tensor([2, 3, 9, 1]),
    )
    code, uniform = random(BATCH, 1, CODE).requires_grad_(), torch.rand(BATCH, 1).double()
    config = core.gate_of_call(steering, discovery=True)
    proposer = Proposer(lambda reading, state, switch: Proposal(code, code, state))
    with fixed_gate(steering) if fixed else nullcontext():
        span = core.steer_span(steering, e, before, proposer, core.GateUse(config, uniform))
    read, unit = steering.norm(e[:, 0]), steering.switching
    hidden = torch.relu(unit.drive(torch.cat([read, before.history], -1)) + unit.code(before.z))
    noise = torch.log(uniform / (1 - uniform))[:, 0] if gate["mode"] == "gumbel-sigmoid" else 0.0
    beta = torch.sigmoid((unit.out(hidden)[:, 0] + noise) / gate.get("temperature", 1.0))
    if gate["mode"] in ("forced", "fixed-frequency"):
        beta = torch.tensor([1.0] * 4 if gate["mode"] == "forced" else [0.0, 1.0, 1.0, 0.0]).double()
    weight = beta
    if gate["mode"] in ("hard", "straight-through"):
        weight = (beta >= gate["threshold"]).double()
    z = weight[:, None] * code[:, 0] + (1 - weight[:, None]) * before.z
    control = torch.einsum("boi,bi->bo", steering.controller.matrix(z), e[:, 0])
    found = (span.beta[:, 0], span.gate[:, 0], span.z[:, 0], span.control[:, 0], span.state.z)
    torch.testing.assert_close(found, (beta, weight, z, control, z))
    torch.testing.assert_close(span.state.history, steering.history(read[:, None], before.history[None])[1][0])
    switched = weight >= steering.gate_config.threshold
    assert span.state.steps_since_switch.tolist() == torch.where(switched, 1, before.steps_since_switch + 1).tolist()
    learned = [value for value in (*unit.parameters(), *steering.norm.parameters()) if span.z.requires_grad]
    slopes = torch.autograd.grad(span.z.square().sum(), learned, allow_unused=True)
    moved = any(slope is not None and bool((slope != 0).any()) for slope in slopes)
    assert moved == (not fixed and gate["mode"] in ("soft", "straight-through", "gumbel-sigmoid"))


@pytest.mark.parametrize("code", CODES)
@by_mode
def test_under_a_fixed_gate_steps_at_once_have_the_gradients_of_steps_one_by_one(gate: Any, code: Any) -> None:
    steering = make_steering(gate=gate, code=code)
    data = Data(steering)
    free = steer(steering, "encoder", (TIME,), data)
    with fixed_gate(steering):
        (values, _, slopes), *others = (steer(steering, "encoder", parts, data) for parts in PARTS)
    for other in others:
        torch.testing.assert_close((other[0], other[2]), (values, slopes))
    torch.testing.assert_close(values, free[0])
    assert {name.split(".")[0] for name in slopes} == {"encoder", "controller"}


@by_mode
def test_given_weights_steer_alike_in_any_number_of_steps(gate: Any) -> None:
    steering = make_steering(gate=gate)
    residual, given = random(BATCH, TIME, WIDTH), torch.rand(BATCH, TIME).double()
    results = []
    for parts in PARTS:
        cache, start, found = None, 0, []
        for steps in parts:
            now = slice(start, start + steps)
            options = {"discovery_phase": True, "temperature": 0.0, "ablate_switch_beta": given[:, now]}
            control, cache = steering(residual[:, now], cache, **options)
            found.append((control, cache.z, cache.switch_beta))
            start += steps
        results.append([torch.cat(values, 1) for values in zip(*found, strict=True)])
    torch.testing.assert_close(results[1:], results[:1] * 2)
