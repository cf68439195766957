"""Rate and distortion against the loss of discovery on the same episodes, and the tolerance of the gate's figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.rate_distortion import rate_distortion
from metacontroller.control.discovery_losses import discover_episodes
from metacontroller.control.switching import GateConfig
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad
from metacontroller.presets.gridworld import debug
from metacontroller.training.seeding import noise_generator

EPISODES, SEED = 32, 5


def test_rate_and_distortion_are_the_means_over_real_steps(untrained: Callable[..., LoadedRun]) -> None:
    run = untrained()
    found = rate_distortion(run, EPISODES, SEED)
    model, steering, generator = run.model, run.meta_controller, noise_generator(SEED, torch.device("cpu"))
    held_out = run.demonstrations("validation")(EPISODES, generator)
    noise = steering.sample_noise(EPISODES, held_out.steps, generator)
    options = (model, held_out.states, held_out.actions, held_out.lengths)
    with torch.no_grad():
        output = discover_episodes(steering, *options, noise=noise)
        log_prob = model.action_readout.log_prob(model.action_readout(model.upper(output.steered)), held_out.actions)
    rows = [(row, step) for row in range(EPISODES) for step in range(int(held_out.lengths[row]))]
    assert found["rate"] == pytest.approx(sum(float(output.kl[at]) for at in rows) / len(rows), rel=1e-4)
    assert found["distortion"] == pytest.approx(-sum(float(log_prob[at]) for at in rows) / len(rows), rel=1e-4)


def test_the_gate_is_judged_within_the_worlds_tolerance(untrained: Callable[..., LoadedRun]) -> None:
    def judged(steps: int) -> float | None:
        class Tolerant(GridworldPinpad):
            gate_tolerance = steps

        return rate_distortion(replace(run, domain=Tolerant(run.domain.config)), EPISODES, SEED)["gate_precision"]

    run = untrained(replace(debug(), meta_controller=replace(debug().meta_controller, gate=GateConfig(mode="forced"))))
    near = judged(0)
    assert near is not None
    assert near < 0.7
    assert judged(100) == 1.0
