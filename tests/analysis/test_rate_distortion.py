"""Rate and distortion against the loss of discovery on the same episodes, and the tolerance of the gate's figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from metacontroller.analysis.rate_distortion import rate_distortion
from metacontroller.control.discovery_losses import discover_episodes
from metacontroller.control.switching import GateConfig
from metacontroller.domains.registry import domain_of
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_meta_controller, build_model
from metacontroller.recipes.run_phase import demonstrations
from metacontroller.training.seeding import noise_generator

EPISODES, SEED = 32, 5


def test_rate_and_distortion_are_the_means_over_real_steps() -> None:
    config = debug()
    model, steering = build_model(config).eval(), build_meta_controller(config).eval()
    source = demonstrations(domain_of(config.domain), "discover")
    found = rate_distortion(model, steering, source, EPISODES, SEED)
    generator = noise_generator(SEED, torch.device("cpu"))
    held_out = source(EPISODES, generator)
    noise = steering.sample_noise(EPISODES, held_out.steps, generator)
    options = (model, held_out.states, held_out.actions, held_out.lengths)
    with torch.no_grad():
        output = discover_episodes(steering, *options, noise=noise)
        log_prob = model.action_readout.log_prob(model.action_readout(model.upper(output.steered)), held_out.actions)
    rows = [(row, step) for row in range(EPISODES) for step in range(int(held_out.lengths[row]))]
    assert found["rate"] == pytest.approx(sum(float(output.kl[at]) for at in rows) / len(rows), rel=1e-4)
    assert found["distortion"] == pytest.approx(-sum(float(log_prob[at]) for at in rows) / len(rows), rel=1e-4)


def test_the_gate_is_judged_within_the_given_tolerance() -> None:
    config = debug()
    config = replace(config, meta_controller=replace(config.meta_controller, gate=GateConfig(mode="forced")))
    model, steering = build_model(config).eval(), build_meta_controller(config)
    source = demonstrations(domain_of(config.domain), "discover")
    near, far = (
        rate_distortion(model, steering, source, EPISODES, SEED, gate_tolerance=steps)["gate_precision"]
        for steps in (0, 100)
    )
    assert near is not None
    assert near < 0.7
    assert far == 1.0
