"""Reproductions with another discovery: all commands speak of the model that is steered and the gate that acts.

With CompILE that gate is the causal one along CompILE's own codes; the metacontroller's acausal encoder is untrained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller.analysis.figures import gate_figure, losses_figure
from metacontroller.analysis.report import player_data
from metacontroller.analysis.switching import gate_report
from metacontroller.baselines.compile import CompILE, begin_probability
from metacontroller.cli import main
from metacontroller.control.metacontroller import MetaController
from metacontroller.models.transformer import Transformer
from metacontroller.phases import reproduce as reproduce_module
from metacontroller.phases.evaluate import gate_figures
from metacontroller.phases.reproduce import gate_of_run, gate_to_draw, load_run
from metacontroller.presets.gridworld import generate, stream_seed
from metacontroller.run_folder import RunFolder

GATE = ("gate_recall", "gate_precision", "gate_binary_fraction")
CPU = ["--device", "cpu"]


def reproduced(out: Path, *words: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce_module, "usable_cores", lambda: 1)
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
    config = load_run(run, "cpu").config
    gate = gate_of_run(load_run(run, "cpu"), 32, 5)
    model = Transformer.init_and_load(run.path / "base_model.safetensors").eval()
    acting = MetaController.init_and_load(run.path / "meta_controller.safetensors").eval()
    segmentation = CompILE.init_and_load(run.path / "compile.safetensors")
    source = generate(config, "discover")
    episodes = source(32, torch.Generator().manual_seed(5))
    assert torch.equal(gate.episodes.states, episodes.states)
    with torch.no_grad():
        code = segmentation(episodes.states, episodes.lengths).code_at()
        beta = begin_probability(acting, model.residual(episodes.states, episodes.actions), code)
    torch.testing.assert_close(gate.code, code)
    torch.testing.assert_close(gate.beta[:, 1:], beta[:, 1:])
    assert bool((gate.beta[:, 0] == 1).all())  # an episode's first step takes a code
    assert gate.figures() != gate_figures(model, acting, source, 32, 5)  # what discovery would have read


def test_after_compile_all_commands_agree(compiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(compiled / "seed-2")
    loaded, summary = load_run(run, "cpu"), run.read_summary()
    found = evaluated(compiled, capsys)
    assert {name: found[name] for name in GATE} == {name: summary[name] for name in GATE}
    assert found["success"] == summary["internal_rl_success"]
    assert evaluated(compiled, capsys, "--policy", "prior")["gate_recall"] == summary["gate_recall"]
    assert main(["gate", str(compiled), "--episodes", "64", *CPU]) == 0
    beta, _, held_out = gate_of_run(loaded, 64, stream_seed(2, "analyse"))
    assert held_out.segments is not None
    analysis = run.read_analysis("gate")
    assert analysis == {**gate_report(beta, held_out.segments, held_out.lengths), "episodes": 64}
    assert main(["report", str(compiled), "--out", str(tmp_path / "report.html"), *CPU]) == 0
    gate = gate_of_run(loaded, 8, stream_seed(2, "analyse"))
    for row, episode in enumerate(player_data(loaded)["episodes"]):
        assert episode["gate"] == pytest.approx(gate.beta[row, : len(episode["gate"])].tolist(), abs=1e-4)


def test_after_compile_the_figures_show_its_gate_and_what_its_codes_cost(compiled: Path) -> None:
    run = RunFolder(compiled / "seed-2")
    costs = [line["code_kl"] for line in run.read_metrics("discover")]
    (_, right) = losses_figure(run).axes
    assert right.get_lines()[1].get_ydata() == pytest.approx(costs)
    gate = gate_to_draw(load_run(run, "cpu"))
    axes = gate_figure(gate, ["0", "1", "2", "3"]).axes
    assert len(axes) == len(gate.beta) == 6
    length = int(gate.episodes.lengths[0])
    assert axes[0].get_lines()[-1].get_ydata() == pytest.approx(gate.beta[0, :length].tolist())


def test_a_model_that_is_trained_along_is_the_one_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = reproduced(tmp_path / "out", "--config.discover.train-model")
    capsys.readouterr()
    run = RunFolder(out / "seed-2")
    summary, found = run.read_summary(), evaluated(out, capsys)
    assert {name: found[name] for name in GATE} == {name: summary[name] for name in GATE}
    assert found["success"] == summary["internal_rl_success"]
    loaded = load_run(run, "cpu")
    source, episodes = generate(loaded.config, "discover"), loaded.config.evaluate.episodes
    measured = gate_figures(loaded.model, loaded.meta_controller, source, episodes, stream_seed(2, "evaluate"))
    assert measured == {name: summary[name] for name in GATE}
