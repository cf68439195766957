"""The switching unit: each mode against its definition, one step against the sequence, no look at the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metacontroller.control.switching import GateConfig, SwitchingUnit, hold_between

BATCH, TIME, WIDTH, HISTORY, CODE = 4, 11, 5, 4, 3
MODES = ("soft", "hard", "straight-through", "gumbel-sigmoid", "forced", "fixed-frequency")


def make_unit(mode: Any, **options: Any) -> SwitchingUnit:
    """Float64, with weights large enough that the gate opens and shuts."""
    config = GateConfig(mode=mode, **options)
    unit = SwitchingUnit(WIDTH, HISTORY, CODE, hidden=6, config=config).double()
    for parameter in unit.parameters():
        nn.init.normal_(parameter)
    return unit


def make_inputs() -> dict[str, Tensor]:
    """residual, history, z_tilde, fresh; the third row starts a new episode in the middle."""
    fresh = torch.zeros(BATCH, TIME, dtype=torch.bool)
    fresh[:, 0] = fresh[2, 5] = True
    shapes = {"residual": (BATCH, TIME, WIDTH), "history": (BATCH, TIME, HISTORY), "z_tilde": (BATCH, TIME, CODE)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()} | {"fresh": fresh}


@pytest.mark.parametrize("mode", MODES)
def test_integration_follows_the_equations(mode: str) -> None:
    unit, inputs = make_unit(mode, temperature=0.7, period=3, threshold=0.4).eval(), make_inputs()
    z, gate, beta = unit(**inputs)
    held, opened = torch.zeros(BATCH, CODE, dtype=torch.float64), set()
    for t in range(TIME):
        fresh = inputs["fresh"][:, t]
        drive = unit.drive(torch.cat([inputs["residual"][:, t], inputs["history"][:, t]], -1))
        logit = unit.out(torch.relu(drive + unit.code(held)))[:, 0]
        probability = (logit / (0.7 if mode == "gumbel-sigmoid" else 1.0)).sigmoid()
        if mode in ("forced", "fixed-frequency"):
            probability = torch.full_like(probability, float(mode == "forced" or t % 3 == 0))
        probability = torch.where(fresh, 1.0, probability)
        mixed = (probability >= 0.4).double() if mode in ("hard", "straight-through") else probability
        held = mixed[:, None] * inputs["z_tilde"][:, t] + (1 - mixed[:, None]) * held
        torch.testing.assert_close(beta[:, t], probability)
        torch.testing.assert_close(gate[:, t], mixed)
        torch.testing.assert_close(z[:, t], held)
        opened |= set((probability >= 0.4).tolist())
    assert opened == ({True} if mode == "forced" else {True, False})


@pytest.mark.parametrize("mode", MODES)
def test_the_first_step_takes_the_fresh_code_bit_for_bit(mode: str) -> None:
    unit, inputs = make_unit(mode), make_inputs()
    nn.init.constant_(unit.out.bias, -1e3)  # never wants to switch
    z, _, beta = unit(**inputs)
    assert torch.equal(z[:, 0], inputs["z_tilde"][:, 0])
    assert torch.equal(z[2, 5], inputs["z_tilde"][2, 5])
    assert bool((beta[:, 0] == 1).all())


def test_an_open_gate_copies_and_a_shut_gate_holds() -> None:
    unit, inputs = make_unit("soft"), make_inputs()
    nn.init.constant_(unit.out.bias, 1e3)
    assert torch.equal(unit(**inputs).z, inputs["z_tilde"])
    nn.init.constant_(unit.out.bias, -1e3)
    z = unit(**inputs).z
    assert torch.equal(z[:2], inputs["z_tilde"][:2, :1].expand(-1, TIME, -1))
    assert torch.equal(z[2, 5:], inputs["z_tilde"][2, 5].expand(TIME - 5, -1))


def test_forced_switching_copies_every_proposal() -> None:
    inputs = make_inputs()
    z, gate, beta = make_unit("forced")(**inputs)
    assert torch.equal(z, inputs["z_tilde"])
    assert bool(((gate == 1) & (beta == 1)).all())


@pytest.mark.parametrize("mode", ["soft", "hard", "straight-through"])
def test_the_gate_sees_neither_the_future_nor_the_proposal_of_its_step(mode: str) -> None:
    # a perturbation, not a gradient, because a hard gate has none; the proposals are fixed
    unit, inputs = make_unit(mode), make_inputs()
    before = unit(**inputs)
    for name, first in (("residual", 6), ("history", 6), ("z_tilde", 5)):
        changed = inputs | {name: inputs[name].clone()}
        changed[name][:, first:] += 3 * torch.randn_like(changed[name][:, first:])
        after = unit(**changed)
        assert torch.equal(after.beta[:, :6], before.beta[:, :6])
        assert not torch.equal(after.beta[:, 6:], before.beta[:, 6:])


def test_the_gate_knows_the_code_in_force() -> None:
    unit, inputs = make_unit("soft"), make_inputs()
    inputs["z_tilde"].requires_grad_()
    (gradient,) = torch.autograd.grad(unit(**inputs).beta[:2, 3].sum(), inputs["z_tilde"])
    assert bool((gradient[:2, :3].abs().sum(-1) > 0).all())
    assert gradient[:2, 3:].abs().max() == 0


@pytest.mark.parametrize("mode", ["hard", "straight-through"])
def test_only_straight_through_teaches_a_hard_gate(mode: str) -> None:
    unit, inputs = make_unit(mode), make_inputs()
    output = unit(**inputs)
    assert set(output.gate.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(output.z, make_hard_twin(unit)(**inputs).z)
    gradients = torch.autograd.grad(output.z.square().sum(), list(unit.parameters()))
    assert all(bool((gradient != 0).any()) == (mode == "straight-through") for gradient in gradients)


def make_hard_twin(unit: SwitchingUnit) -> SwitchingUnit:
    """The same weights in mode "hard"."""
    copy = make_unit("hard")
    copy.load_state_dict(unit.state_dict())
    return copy


def test_gumbel_noise_is_what_was_drawn_while_training_only() -> None:
    unit, inputs = make_unit("gumbel-sigmoid", temperature=0.5), make_inputs()
    one, two = (torch.rand(inputs["fresh"].shape) for _ in range(2))
    first, again, other = (unit(**inputs, uniform=uniform).beta[:, 1:] for uniform in (one, one, two))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    unit.eval()
    assert torch.equal(unit(**inputs).beta, unit(**inputs).beta)


def test_gumbel_noise_is_logistic() -> None:
    # with no weights the relaxed gate is sigmoid(noise / temperature), and P(noise < log(p / (1 - p))) = p
    unit = SwitchingUnit(WIDTH, HISTORY, CODE, hidden=6, config=GateConfig(mode="gumbel-sigmoid", temperature=2.0))
    for parameter in unit.parameters():
        nn.init.zeros_(parameter)
    zeros = torch.zeros(2000, 6, 1)
    fresh = torch.zeros(2000, 6, dtype=torch.bool)
    beta = unit(zeros.expand(-1, -1, WIDTH), zeros.expand(-1, -1, HISTORY), zeros.expand(-1, -1, CODE), fresh).beta
    noise = torch.logit(beta) * 2
    for share in (0.1, 0.5, 0.9):
        assert (noise < torch.logit(torch.tensor(share))).float().mean() == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("mode", MODES)
def test_one_step_equals_the_sequence(mode: str) -> None:
    unit, inputs = make_unit(mode, temperature=0.3, period=3).eval(), make_inputs()
    inputs["fresh"][2, 5] = False
    z, gate, beta = unit(**inputs)
    before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1)
    held = torch.zeros(BATCH, dtype=torch.long)
    for t in range(TIME):
        if t:
            single = unit.probability(inputs["residual"][:, t], inputs["history"][:, t], before[:, t], held)
            torch.testing.assert_close(single, beta[:, t])
        held = torch.where(gate[:, t] == 1, 1, held + 1)


def test_holding_between_switches_starts_from_the_code_before() -> None:
    z_tilde = torch.arange(5.0)[None, :, None]
    switch = torch.tensor([[False, False, True, False, True]])
    z, gate, beta = hold_between(z_tilde, switch, torch.tensor([[9.0]]))
    assert z.flatten().tolist() == [9, 9, 2, 2, 4]
    assert gate.tolist() == beta.tolist() == [[0, 0, 1, 0, 1]]
    assert hold_between(z_tilde, switch).z.flatten().tolist() == [0, 0, 2, 2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"period": 0}, "period is 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig(**options)


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as for users, who get our own messages
    with pytest.raises(ValueError, match="'sometimes'; expected one of 'soft'"):
        GateConfig(mode="sometimes")  # pyright: ignore[reportArgumentType]
