"""Held-out episodes for the report's player: they fit together, are small, and say what there is none of."""

from __future__ import annotations

import io
import json
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import Tensor

from metacontroller.analysis import episodes as module
from metacontroller.analysis.episodes import Episodes, main_axes, png
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.probing import Probes
from metacontroller.analysis.registry import run_analysis
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import Domain, DomainSpec
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpad

Untrained = Callable[..., LoadedRun]
HEAD = "data:image/png;base64,"


def pixels(frame: str) -> np.ndarray:
    """A frame, float32 (height, width, 3) in [0, 1]."""
    assert frame.startswith(HEAD)
    return matplotlib.image.imread(io.BytesIO(b64decode(frame[len(HEAD) :])))


def test_the_lists_of_an_episode_fit_together(untrained: Untrained) -> None:
    run = untrained()
    results = run_analysis("episodes", run)
    assert (results["names"], results["every"], len(results["episodes"])) == (["0", "1", "2", "3"], 1, 8)
    for episode in results["episodes"]:
        steps = len(episode["gate"])
        assert len(episode["subgoals"]) == len(episode["code"]) == steps
        assert len(episode["frames"]) == steps + 1
        assert episode["gate"][0] == 1  # the first step takes a code of its own
        goals = episode["subgoals"]
        assert episode["changes"] == [step for step in range(1, steps) if goals[step] != goals[step - 1]]
        begun = [goals[0], *(goals[step] for step in episode["changes"])]
        assert episode["task"] == " → ".join(map(str, begun))
        assert episode["belief"] is None
    rows = dict(Episodes().rows([results]))
    assert rows["pictures"][0] == rows["steps"][0] + rows["episodes"][0]


def test_frames_are_the_pictures_of_the_states(untrained: Untrained) -> None:
    run = untrained()
    held_out = run.demonstrations("validation")(8, torch.Generator().manual_seed(run.seed * 8 + 7))
    frames = run_analysis("episodes", run)["episodes"][2]["frames"]
    pictures = run.domain.render(held_out.states[2, : len(frames)])
    for frame, picture in zip(frames, pictures, strict=True):
        np.testing.assert_array_equal(np.round(255 * pixels(frame)), picture.numpy())


def test_the_belief_is_that_of_the_probe_at_the_controlled_layer(untrained: Untrained) -> None:
    run = untrained()
    Probes().measure(run, Probes.Config(steps=2, batch_size=4, episodes=8), quiet=True)
    results = run_analysis("episodes", run, Episodes.Config(episodes=2))
    tensors, _ = run.folder.load_checkpoint("probes")
    held_out = run.demonstrations("validation")(2, torch.Generator().manual_seed(run.seed * 8 + 7))
    with torch.no_grad():
        residual = run.base.residual(held_out.states, held_out.actions)[0, 0]
    expected = torch.softmax(tensors["probes.1.weight"] @ residual + tensors["probes.1.bias"], -1)
    assert results["episodes"][0]["belief"][0] == pytest.approx(expected.tolist(), abs=1e-3)


class Noisy(GridworldPinpad):
    """The same world with pictures that cannot be compressed."""

    def render(self, states: Tensor) -> Tensor:
        return torch.randint(256, (len(states), 64, 48, 3), dtype=torch.uint8)


def test_many_pictures_are_thinned_and_drawn_small(untrained: Untrained, monkeypatch: pytest.MonkeyPatch) -> None:
    run = untrained()
    monkeypatch.setattr(module, "MAX_PICTURES", 20)
    monkeypatch.setattr(module, "MAX_BYTES", 60_000)
    results = run_analysis("episodes", replace(run, domain=Noisy(run.domain.config)))
    lengths = [len(episode["gate"]) for episode in results["episodes"]]
    every = results["every"]
    assert every == -(-sum(lengths) // 20) > 1
    assert [len(episode["frames"]) for episode in results["episodes"]] == [length // every + 1 for length in lengths]
    frames = [frame for episode in results["episodes"] for frame in episode["frames"]]
    assert sum(map(len, frames)) < 60_000 * 4 / 3 + 30 * len(frames)
    assert pixels(frames[0]).shape[0] < 64


class Bare(GridworldPinpad):
    """The same world without labels and without pictures."""

    render = Domain.render

    def spec(self) -> DomainSpec:
        return replace(super().spec(), subgoals=())

    def demonstrations(self, *arguments: Any) -> Trajectories:
        return replace(super().demonstrations(*arguments), subgoals=None, segments=None)


def test_a_world_without_labels_and_pictures_says_so(untrained: Untrained) -> None:
    run = untrained()
    results = run_analysis("episodes", replace(run, domain=Bare(run.domain.config)))
    assert results["names"] == []
    for episode in results["episodes"]:
        assert all(episode[name] is None for name in ("subgoals", "changes", "belief", "frames"))
        assert episode["task"] == ""
    assert len(json.dumps(results)) < 20_000


def test_a_png_holds_every_pixel() -> None:
    picture = np.random.default_rng(0).integers(256, size=(5, 9, 3), dtype=np.uint8)
    shown = matplotlib.image.imread(io.BytesIO(png(picture)))
    np.testing.assert_array_equal(np.round(255 * shown), picture)


def test_main_axes_keep_the_largest_spread() -> None:
    z = torch.randn(6, 5, 4, dtype=torch.float64) * torch.tensor([0.1, 3.0, 0.2, 1.0], dtype=torch.float64)
    mask = torch.ones(6, 5, dtype=torch.bool)
    axes = main_axes(z, mask)
    center = (z - z.mean((0, 1))).flatten(0, 1)
    values = torch.linalg.eigvalsh(center.T @ center)
    torch.testing.assert_close(axes.flatten(0, 1).square().sum(0), values.flip(0)[:2])
    assert main_axes(z[..., :1], mask).shape == (6, 5, 2)
