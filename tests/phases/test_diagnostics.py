"""Diagnostics of discovery: each warning by values made by hand, the measures against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from metacontroller.control.discovery_losses import kl_loss, steered_losses
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.registry import domain_of
from metacontroller.metrics.switch_alignment import binary_fraction, codes_taken
from metacontroller.models.transformer import Transformer
from metacontroller.phases.diagnostics import diagnose, measure
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_meta_controller, build_model
from metacontroller.recipes.run_phase import demonstrations

SOUND = {"codes": 2.5, "binary_fraction": 0.9, "kl": 0.3, "steered_loss": 0.4, "base_loss": 0.5}


def test_a_sound_discovery_has_no_warning() -> None:
    assert diagnose(**SOUND) == []
    at_the_limits = {"codes": 1.05, "binary_fraction": 0.5, "kl": 0.01, "steered_loss": 0.0, "base_loss": 1e-3}
    assert diagnose(**at_the_limits) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": 1.04}, "the gate never opens: 1.04 codes an episode"),
        ({"binary_fraction": 0.49}, "the gate is undecided: a share of 0.49"),
        ({"kl": 0.009}, "codes have collapsed to the prior: their KL is 0.0090 nats per step"),
        ({"steered_loss": 0.4995}, "codes do not change the actions: the action loss is 0.4995 nats per step with"),
        ({"steered_loss": 0.6}, "codes make the experts' actions less likely: the action loss is 0.6000"),
        ({"steered_loss": math.nan}, "codes do not change the actions: the action loss is nan"),
    ],
)
def test_each_failure_has_a_warning_of_one_line(change: dict[str, float], message: str) -> None:
    (warning,) = diagnose(**(SOUND | change))
    assert warning.startswith(message)
    assert "\n" not in warning


def test_all_failures_are_named_together() -> None:
    nothing = {"codes": 1.0, "binary_fraction": 0.0, "kl": 0.0, "steered_loss": 0.5, "base_loss": 0.5}
    assert len(diagnose(**nothing)) == len(diagnose(**nothing, left=10.0)) == 4


def test_where_the_base_knows_all_actions_that_is_the_only_cause() -> None:
    nothing = {"codes": 1.0, "binary_fraction": 0.0, "kl": 0.0, "steered_loss": 1e-4, "base_loss": 1e-4}
    (warning,) = diagnose(**nothing, left=1.3e-3)
    assert warning.startswith("nothing is left for codes to say: without them the action loss is 0.0001 nats per step")
    assert diagnose(**SOUND, left=0.1) == []  # all is well


def test_what_is_left_to_say_is_not_asked_of_densities() -> None:
    torch.manual_seed(0)
    model = Transformer(
        16,
        action_embed_readout={"num_continuous": 2},
        state_embed_readout={"num_continuous": 3},
        lower_body={"depth": 1},
        upper_body={"depth": 1},
    )
    batch = Trajectories(states=torch.randn(4, 6, 3), actions=torch.randn(4, 5, 2), lengths=torch.tensor([5, 4, 3, 2]))
    steering = MetaController(16, dim_latent=2)
    assert measure(model, steering, batch, torch.Generator().manual_seed(1))["left"] is None


def test_codes_and_binary_fraction_are_of_real_steps_but_the_first() -> None:
    beta = torch.tensor([[1.0, 0.5, 0.49, 0.95], [0.2, 0.05, 0.9, 1.0], [0.0, 1.0, 1.0, 1.0]])
    lengths = torch.tensor([4, 2, 1])
    assert codes_taken(beta, lengths, threshold=0.5).tolist() == [3, 1, 1]
    assert codes_taken(beta, lengths, threshold=0.4).tolist() == [4, 1, 1]
    assert binary_fraction(beta, lengths).item() == pytest.approx(2 / 4)


def test_what_is_measured_on_a_batch() -> None:
    model, steering = build_model(debug()), build_meta_controller(debug())
    batch = demonstrations(domain_of(debug().domain), "discover")(8, torch.Generator().manual_seed(0))
    measured = measure(model, steering, batch, torch.Generator().manual_seed(1))
    noise = steering.sample_noise(batch.batch, batch.steps, torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses, output = steered_losses(steering, model, batch.states, batch.actions, batch.lengths, noise=noise)
        base = model.behavior_cloning_loss(batch.states, batch.actions, batch.lengths)
    later = [beta for row, n in zip(output.beta.tolist(), batch.lengths.tolist(), strict=True) for beta in row[1:n]]
    expected = {
        "codes": 1 + sum(beta >= 0.5 for beta in later) / batch.batch,
        "binary_fraction": sum(beta <= 0.1 or beta >= 0.9 for beta in later) / len(later),
        "kl": float(kl_loss(output)),
        "steered_loss": float(losses.action),
        "base_loss": float(base.action),
        "left": float(base.action) * float(batch.lengths.sum()) / batch.batch,
    }
    assert measured == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in steering.parameters())


def test_a_controller_of_zeros_changes_no_actions() -> None:
    model, steering = build_model(debug()), build_meta_controller(debug())
    torch.nn.init.zeros_(steering.controller.write)
    batch = demonstrations(domain_of(debug().domain), "discover")(8, torch.Generator().manual_seed(0))
    measured = measure(model, steering, batch, torch.Generator().manual_seed(1))
    assert measured["steered_loss"] == pytest.approx(measured["base_loss"], abs=1e-6)
    assert any(warning.startswith("codes do not change the actions") for warning in diagnose(**measured))
