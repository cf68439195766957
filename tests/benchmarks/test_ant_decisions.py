"""Where an ant decides: every real step is of one kind, and the choice of a mode costs its weight."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from helpers import load_script
from metacontroller.domains.ant_pinpad.dataset import versions
from metacontroller.domains.ant_pinpad.domain import AntPinpad, AntPinpadConfig
from metacontroller.models.readouts import GaussianMixtureReadout, GaussianReadout

SCRIPT = load_script(Path(__file__).parents[2] / "benchmarks" / "ant_decisions.py")
needs_mujoco = pytest.mark.skipif(versions() == {}, reason="the extra ant is not installed")


@needs_mujoco
def test_every_real_step_is_of_one_kind() -> None:
    world = AntPinpad(AntPinpadConfig(threads=1))
    episodes = world.demonstrate((0, 2, 1), 6, torch.Generator().manual_seed(0))
    kinds = SCRIPT.decisions(world, episodes)
    assert torch.equal(torch.stack(list(kinds.values())).sum(0), episodes.mask().long())
    arrivals = kinds["at a color, one direction"] | kinds["at a color, several directions"]
    assert arrivals.sum(1).tolist() == [2] * 6  # the last color ends the episode
    assert kinds["first step"].sum(1).tolist() == [1] * 6
    entered = kinds["new cell, the way turns"] | kinds["new cell, straight on"]
    assert 1 < float(entered.sum(1).float().mean()) < 20


def test_a_choice_costs_the_weight_of_its_mode() -> None:
    readout = GaussianMixtureReadout(1, 1, modes=2)
    gaussians = torch.tensor([[-5.0, 0.0], [5.0, 0.0]])
    params = torch.cat([torch.tensor([0.25, 0.75]).log(), gaussians.flatten()])[None, None]
    for value, weight in ((-5.0, 0.25), (5.0, 0.75)):
        cost = SCRIPT.choice(readout, params, torch.tensor([[[value]]]))
        assert float(cost) == pytest.approx(-math.log(weight), abs=1e-5)
    assert float(SCRIPT.choice(GaussianReadout(1, 1), params, torch.zeros(1, 1, 1))) == 0.0
