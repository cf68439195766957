"""The gate along held-out episodes: of the metacontroller, and after CompILE; and the analysis of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from metacontroller.analysis import gate_alignment as module
from metacontroller.analysis.gate_alignment import Gate, held_out_gate
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.rate_distortion import rate_distortion
from metacontroller.analysis.registry import run_analysis
from metacontroller.baselines.compile import build_compile
from metacontroller.control.discovery_losses import discover_episodes
from metacontroller.control.switching import GateConfig
from metacontroller.metrics.switch_alignment import gate_alignment
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import build_meta_controller, load_run

Untrained = Callable[..., LoadedRun]


def test_the_figures_count_over_all_episodes_and_not_per_batch(
    untrained: Untrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained()
    monkeypatch.setattr(module, "MAX_BATCH", 7)
    beta, code, held_out, *_ = gate = held_out_gate(run, 20, seed=3)
    assert held_out.segments is not None
    assert beta.shape == held_out.actions.shape
    assert code.shape == (*beta.shape, debug().meta_controller.dim_latent)
    expected = gate_alignment(beta, held_out.segments, held_out.lengths, threshold=0.5)
    assert gate.figures() == {name: pytest.approx(float(value)) for name, value in expected.items()}


def test_values_of_an_episode_do_not_depend_on_its_batch(untrained: Untrained) -> None:
    config = debug()
    run, quiet = untrained(config), build_meta_controller(config)
    readout = quiet.encoder[-1]
    assert isinstance(readout, torch.nn.Linear)
    with torch.no_grad():  # no noise in the codes
        readout.weight[config.meta_controller.dim_latent :] = 0.0
        readout.bias[config.meta_controller.dim_latent :] = -20.0
    quiet.save(run.folder.path / "meta_controller.safetensors")
    whole, codes, held_out, *_ = held_out_gate(run, 12, seed=3)
    row = int(held_out.lengths.argmin())
    length = int(held_out.lengths[row])
    alone = held_out.index(torch.tensor([row]))
    with torch.no_grad():
        output = discover_episodes(quiet, run.model, alone.states, alone.actions, alone.lengths)
    torch.testing.assert_close(whole[row, :length], output.beta[0, :length], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codes[row, :length], output.z[0, :length], atol=1e-3, rtol=1e-3)  # noise of e^-10


def test_after_compile_the_causal_gate_runs_along_the_codes_of_the_segments(untrained: Untrained) -> None:
    config = replace(debug(), discovery="compile")
    run = untrained(config)
    encoder, dim_latent = run.domain.spec().encoder, config.meta_controller.dim_latent
    segmentation = build_compile(config.compile, run.base, encoder, dim_latent, 0)
    segmentation.save(run.folder.path / "compile.safetensors")
    beta, code, held_out, nats, *_ = held_out_gate(load_run(run.folder, "cpu"), 12, seed=3)
    assert bool((beta[:, 0] == 1).all())
    assert nats is None
    with torch.no_grad():
        expected = segmentation(held_out.states, held_out.lengths).code_at()
    torch.testing.assert_close(code[held_out.mask()], expected[held_out.mask()])


@pytest.mark.parametrize(("threshold", "found"), [(0.1, 1.0), (0.9, 0.0)])
def test_switches_are_counted_at_the_gates_threshold(untrained: Untrained, threshold: float, found: float) -> None:
    config = debug()
    sizes = replace(config.meta_controller, gate=GateConfig(threshold=threshold))  # beta is about 0.5
    run = untrained(replace(config, meta_controller=sizes))
    gate = held_out_gate(run, 16, seed=3)
    assert gate.figures()["gate_recall"] == found
    assert gate.report()["recall"] == [found] * 3
    assert int(gate.switches().sum()) == (int(gate.episodes.lengths.sum()) if found else 16)
    codes = rate_distortion(run, 16, 3)
    encoder = run.domain.spec().encoder
    segmentation = build_compile(config.compile, run.base, encoder, config.meta_controller.dim_latent, 0)
    segmentation.save(run.folder.path / "compile.safetensors")
    segments = rate_distortion(replace(run, segmented=True), 16, 3)
    assert codes["gate_recall"] == segments["gate_recall"] == found


def test_the_analysis_has_a_line_for_each_tolerance_and_measure(untrained: Untrained) -> None:
    results = run_analysis("gate", untrained(), Gate.Config(episodes=16))
    assert (results["tolerance"], results["episodes"]) == ([0, 1, 2], 16)
    rows = Gate().rows([results, results])
    assert len(rows) == 9
    assert rows[4] == ("precision within 1 steps", 2 * [results["precision"][1]])
    with pytest.raises(ValueError, match="episodes is 0; expected at least 1"):
        Gate.Config(episodes=0)
