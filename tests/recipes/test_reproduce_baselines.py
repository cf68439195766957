"""Reproductions with another discovery: all commands speak of the model that is steered and the gate that acts.

With CompILE that gate is the causal one along CompILE's own codes; the metacontroller's acausal encoder is untrained.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import quick_reproductions
from metacontroller.analysis.gate_alignment import held_out_gate
from metacontroller.baselines.compile import CompILE, boundary_probability
from metacontroller.cli import main
from metacontroller.control.metacontroller import MetaController
from metacontroller.models.transformer import Transformer
from metacontroller.recipes.config import load_run
from metacontroller.report.figures import gate_figure, losses_figure
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import stream_seed

GATE = ("gate_recall", "gate_precision", "gate_binary_fraction")
CPU = ["--device", "cpu"]


def reproduced(out: Path, *words: str) -> Path:
    with quick_reproductions():
        command = ["reproduce", "--preset", "debug", "--out", str(out), "--seeds", "2", "--quiet", *CPU]
        assert main([*command, *words]) == 0
    return out


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reproduced(tmp_path_factory.mktemp("compile") / "out", "--config.discovery", "compile")


def evaluated(out: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["evaluate", str(out), "--json", *words, *CPU]) == 0
    return json.loads(capsys.readouterr().out)[0]


def test_after_compile_the_gate_is_the_causal_one_along_its_own_codes(compiled: Path) -> None:
    run = RunFolder(compiled / "seed-2")
    loaded = load_run(run, "cpu")
    gate = held_out_gate(loaded, 32, 5)
    model = Transformer.init_and_load(run.path / "base_model.safetensors").eval()
    acting = MetaController.init_and_load(run.path / "meta_controller.safetensors").eval()
    segmentation = CompILE.init_and_load(run.path / "compile.safetensors")
    episodes = loaded.demonstrations("validation")(32, torch.Generator().manual_seed(5))
    assert torch.equal(gate.episodes.states, episodes.states)
    with torch.no_grad():
        code = segmentation(episodes.states, episodes.lengths).code_at()
        beta = boundary_probability(acting, model.residual(episodes.states, episodes.actions), code)
    torch.testing.assert_close(gate.code, code)
    torch.testing.assert_close(gate.beta[:, 1:], beta[:, 1:])
    assert bool((gate.beta[:, 0] == 1).all())  # an episode's first step takes a code
    read_by_discovery = held_out_gate(replace(loaded, segmented=False), 32, 5)
    assert gate.figures() != read_by_discovery.figures()


def test_after_compile_all_commands_agree(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(compiled / "seed-2")
    loaded, summary = load_run(run, "cpu"), run.read_summary()
    found = evaluated(compiled, capsys)
    assert {name: found[name] for name in GATE} == {name: summary[name] for name in GATE}
    assert found["success"] == summary["internal_rl_success"]
    assert evaluated(compiled, capsys, "--policy", "prior")["gate_recall"] == summary["gate_recall"]
    assert main(["gate", str(compiled), "--episodes", "64", *CPU]) == 0
    analysis = run.read_analysis("gate")
    assert analysis == {**held_out_gate(loaded, 64, stream_seed(2, "analyse")).report(), "episodes": 64}
    assert main(["report", str(compiled), "--out", str(tmp_path / "report.html"), *CPU]) == 0
    gate = held_out_gate(loaded, 8, stream_seed(2, "analyse"))
    for row, episode in enumerate(run.read_analysis("episodes")["episodes"]):
        assert episode["gate"] == pytest.approx(gate.beta[row, : len(episode["gate"])].tolist(), abs=1e-4)


def test_after_compile_the_figures_show_its_gate_and_what_its_codes_cost(compiled: Path) -> None:
    run = RunFolder(compiled / "seed-2")
    costs = [line["code_kl"] for line in run.read_metrics("discover")]
    (_, right) = losses_figure(run).axes
    assert right.get_lines()[1].get_ydata() == pytest.approx(costs)
    gate = held_out_gate(load_run(run, "cpu"), 8, stream_seed(2, "analyse"))
    axes = gate_figure(run.read_analysis("episodes")).axes
    assert len(axes) == 6
    length = int(gate.episodes.lengths[0])
    assert axes[0].get_lines()[-1].get_ydata() == pytest.approx(gate.beta[0, :length].tolist(), abs=1e-4)


def test_a_model_that_is_trained_along_is_the_one_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = reproduced(tmp_path / "out", "--config.discover.train-model")
    capsys.readouterr()
    run = RunFolder(out / "seed-2")
    summary, found = run.read_summary(), evaluated(out, capsys)
    assert {name: found[name] for name in GATE} == {name: summary[name] for name in GATE}
    assert found["success"] == summary["internal_rl_success"]
    loaded = load_run(run, "cpu")
    measured = held_out_gate(loaded, loaded.settings.episodes, stream_seed(2, "evaluate")).figures()
    assert measured == {name: summary[name] for name in GATE}
