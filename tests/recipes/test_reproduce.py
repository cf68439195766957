from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import quick_reproductions
from metacontroller.analysis.gate_alignment import held_out_gate
from metacontroller.cli import main
from metacontroller.errors import UserError
from metacontroller.presets.gridworld import debug
from metacontroller.recipes import reproduce as module
from metacontroller.recipes.config import load_run, read_config, with_seed
from metacontroller.recipes.jobs import in_processes
from metacontroller.recipes.reproduce import reproduce, show_episodes
from metacontroller.recipes.run_phase import PHASES, run_phase
from metacontroller.report import figures
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import stream_seed

ARTEFACTS: dict[str, str] = dict(
    zip(PHASES, ("base_model", "meta_controller", "internal_rl_policy", "raw_action_model"), strict=True)
)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_reproductions():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reproduction of the debug preset that was never interrupted."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    with quick_reproductions(drawn=True):
        reproduce(debug(), out, [0], quiet=True)
    return out


def interrupt_at(patch: pytest.MonkeyPatch, phase: str) -> None:
    """The phase is interrupted right after its first checkpoint."""
    save: Callable = RunFolder.save_checkpoint

    def save_and_stop(self: RunFolder, name: str, *rest: Any) -> Path:
        path = save(self, name, *rest)
        if name == phase:
            raise KeyboardInterrupt
        return path

    patch.setattr(RunFolder, "save_checkpoint", save_and_stop)


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_summary_has_a_value_for_each_seed(finished: Path) -> None:
    summary = RunFolder(finished).read_summary()
    assert summary["seeds"] == [0]
    assert (summary["task"], summary["subgoals"]) == ("0-1", ["0", "1", "2", "3"])
    share = RunFolder(finished / "seed-0").read_summary()["code_subgoal_share"]
    assert [sum(row) for row in share] == pytest.approx([1.0] * debug().evaluate.codes)
    for name in (
        "internal_rl_success",
        "raw_action_success",
        "gate_recall",
        "gate_precision",
        "gate_binary_fraction",
        "code_subgoal_bits",
        "prior_success",
        "raw_initial_success",
        "unseen_transition_share",
        "probe_accuracy",
        "supervised_success",
        "oracle_seen",
        "oracle_unseen",
        "code_nats",
        "seconds",
    ):
        assert len(summary[name]) == 1
        assert isinstance(summary[name][0], float)
    assert summary["episodes"] == 192
    assert summary["peak_rss_mb"] > 50
    assert set(summary["phase_seconds"][0]) == {*PHASES, "evaluate"}
    assert summary["seconds"][0] == pytest.approx(sum(summary["phase_seconds"][0].values()))
    assert summary["versions"]["torch"] == torch.__version__


def test_the_figures_are_png_files(finished: Path) -> None:
    expected = ["figures/success.png"] + [f"seed-0/figures/{n}.png" for n in ("codes", "gate", "losses", "success")]
    for name in expected:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_internal_rl_leaves_the_base_and_all_but_the_policy_alone(finished: Path) -> None:
    run = finished / "seed-0"
    assert not same_weights(run / "base_model.safetensors", run / "raw_action_model.safetensors")
    found, learned = load_file(run / "meta_controller.safetensors"), load_file(run / "internal_rl_policy.safetensors")
    changed = {name for name in found if not torch.equal(found[name], learned[name])}
    assert changed == {name for name in found if name.startswith("policy.")}


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupted_phase_is_resumed_bit_for_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    folder, artefact = tmp_path / "seed-0", f"{ARTEFACTS[phase]}.safetensors"
    shutil.copytree(finished / "seed-0", folder)
    for name in (f"{phase}.safetensors", artefact, "metrics.jsonl", "manifest.json"):
        (folder / name).unlink()
    with monkeypatch.context() as patch:
        interrupt_at(patch, phase)
        with pytest.raises(KeyboardInterrupt):
            run_phase(phase, debug(), folder, True, "cpu")
    assert not (folder / artefact).exists()
    begun = RunFolder(folder).load_checkpoint(phase)[1]["seconds"]
    run_phase(phase, debug(), folder, True, "cpu")
    assert same_weights(folder / artefact, finished / "seed-0" / artefact)
    steps = [line["step"] for line in RunFolder(folder).read_metrics(phase)]
    assert steps == [line["step"] for line in RunFolder(finished / "seed-0").read_metrics(phase)]
    assert RunFolder(folder).load_checkpoint(phase)[1]["seconds"] > begun


@pytest.fixture(scope="module")
def cotrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reproduction in which discovery trains the model along, so far that it acts otherwise than the base."""
    out, config = tmp_path_factory.mktemp("reproduce") / "cotrained", debug()
    optimizer = replace(config.discover.optimizer, lr=0.1)
    config = replace(config, discover=replace(config.discover, train_model=True, optimizer=optimizer))
    with quick_reproductions():
        reproduce(config, out, [0], quiet=True)
    return out / "seed-0"


def test_a_run_with_a_cotrained_model_is_judged_by_what_was_reinforced(
    cotrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = RunFolder(cotrained).read_summary()
    for policy, name in (("internal-rl", "internal_rl_success"), ("prior", "prior_success")):
        assert main(["evaluate", str(cotrained), "--policy", policy, "--json", "--device", "cpu"]) == 0
        evaluated = json.loads(capsys.readouterr().out)
        assert summary[name] == evaluated["success"]
        for measure in ("gate_recall", "gate_precision", "gate_binary_fraction", "code_subgoal_bits"):
            assert summary[measure] == evaluated[measure]


def test_a_loaded_run_has_the_model_that_is_steered(cotrained: Path, finished: Path) -> None:
    run = load_run(RunFolder(cotrained), "cpu")
    for model, name in ((run.model, "cotrained_model"), (run.base, "base_model")):
        saved = load_file(cotrained / f"{name}.safetensors")
        assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert not same_weights(cotrained / "cotrained_model.safetensors", cotrained / "base_model.safetensors")
    frozen = load_run(RunFolder(finished / "seed-0"), "cpu")
    assert frozen.model is frozen.base
    assert frozen.settings == debug().evaluate
    assert read_config(frozen.folder) == debug()


def test_figure_and_player_show_the_gate_of_the_model_that_is_steered(cotrained: Path) -> None:
    run = load_run(RunFolder(cotrained), "cpu")
    shown = run.folder.read_analysis("episodes")
    gate = shown["episodes"][0]["gate"]
    expected, other = (
        held_out_gate(judged, len(shown["episodes"]), stream_seed(run.seed, "analyse")).beta[0, : len(gate)]
        for judged in (run, replace(run, cotrained=False))
    )
    assert gate == pytest.approx(expected.tolist(), abs=1e-4)
    assert gate != pytest.approx(other.tolist(), abs=1e-4)
    drawn = [float(y) for y in figures.gate_figure(shown).axes[0].lines[-1].get_ydata()]  # type: ignore[union-attr]
    assert drawn == pytest.approx(gate)


def test_episodes_are_shown_again_once_there_are_probes(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "seed-0", tmp_path, dirs_exist_ok=True)
    run = load_run(RunFolder(tmp_path), "cpu")
    path = tmp_path / "analyses" / "episodes.json"
    before = path.stat().st_mtime_ns
    show_episodes(run)
    assert path.stat().st_mtime_ns == before
    assert main(["probe", str(tmp_path), "--steps", "2", "--episodes", "8", "--quiet", "--device", "cpu"]) == 0
    for _ in range(2):
        show_episodes(run)
        assert run.folder.read_analysis("episodes")["episodes"][0]["belief"] is not None
        after, before = before, path.stat().st_mtime_ns
    assert after == before


def test_an_interrupted_reproduction_is_resumed_where_it_stopped(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "discover")
        with pytest.raises(KeyboardInterrupt):
            reproduce(debug(), out, [0], quiet=True)
    summary = reproduce(debug(), out, [0], resume=True, quiet=True)
    whole = RunFolder(finished).read_summary()
    for name in ("internal_rl_success", "raw_action_success", "gate_recall", "gate_precision", "code_subgoal_bits"):
        assert summary[name] == whole[name]


def test_a_finished_reproduction_does_nothing_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, "run_phase", lambda *_: pytest.fail("a phase ran again"))
    summary = reproduce(debug(), finished, [0], resume=True, quiet=True)
    assert summary == RunFolder(finished).read_summary()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == files


def test_a_resumed_reproduction_may_have_more_seeds(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    summary = reproduce(debug(), out, [0, 1], resume=True, quiet=True)
    assert summary["seeds"] == [0, 1]
    assert not same_weights(out / "seed-0" / "base_model.safetensors", out / "seed-1" / "base_model.safetensors")
    assert read_config(RunFolder(out / "seed-1")) == with_seed(debug(), 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": []}, r"seeds are \[\]; give at least one, each once\."),
        ({"seeds": [1, 1]}, r"seeds are \[1, 1\]; give at least one, each once\."),
        ({"workers": 0}, r"workers is 0; expected at least 1\."),
        ({}, r"out holds a run; add --resume to resume it, or choose another --out\."),
        ({"resume": True, "config": replace(debug(), domain=replace(debug().domain, post_task=(3, 2)))},
         r"out was started with another configuration; leave out --preset"),
    ],
)  # fmt: skip
def test_what_cannot_be_reproduced_is_refused(finished: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        reproduce(**{"config": debug(), "out": finished, "quiet": True, **options})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds files of something else; choose another --out\."):
        reproduce(debug(), tmp_path, resume=True)


def test_phases_done_by_their_own_commands_are_part_of_a_reproduction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "seed-0"
    for command in (["pretrain", "--preset", "debug"], ["discover"]):
        assert main([command[0], str(folder), *command[1:], "--quiet", "--device", "cpu"]) == 0
    costs = {phase: RunFolder(folder).load_checkpoint(phase)[1] for phase in ("pretrain", "discover")}
    for cost in costs.values():
        assert cost["seconds"] > 0
        assert cost["peak_rss_mb"] > 50
    summary = module.reproduce_seed(debug(), folder, quiet=True)
    for phase, cost in costs.items():
        assert summary["phase_seconds"][phase] == cost["seconds"]


def test_it_says_what_runs_until_its_end(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(function: Callable[..., Any], jobs: list[tuple[Any, ...]], **_: int) -> None:
        for job in jobs:
            function(*job)

    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    monkeypatch.setattr(module, "in_processes", in_this_process)
    shutil.copytree(finished / "seed-0", tmp_path / "seed-0")
    (tmp_path / "seed-0" / "summary.json").unlink()
    for name in ("config.json", "manifest.json"):
        shutil.copy(finished / name, tmp_path)
    reproduce(debug(), tmp_path, [0], resume=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("discover: warning")]
    said = [line.partition(" ")[0] if "/" in line else line for line in lines]
    assert said == [
        *("pretrain:", "discover:", "internal_rl:", "raw_action_rl:"),
        "evaluate: what codes mean",
        "evaluate: transitions that training never shows",
        *(f"evaluate: success of {policy}" for policy in ("internal-rl", "raw", "prior", "base")),
        "evaluate: the gate against subgoals",
        *(
            f"evaluate: {link}"
            for link in ("linear probe of the subgoal", "supervised controllers", "codes of experts")
        ),
        "figures of the run",
        "figures of all seeds",
    ]


@pytest.mark.slow
def test_side_by_side_and_with_workers_the_result_is_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    for workers, label in ((1, ""), (2, "seed 0, ")):
        out = tmp_path / str(workers)
        reproduce(debug(), out, [0], workers=workers)
        lines = capfd.readouterr().err.splitlines()
        for text in (*(f"{phase}: " for phase in PHASES), "evaluate: ", "figures of the run"):
            assert any(line.startswith(label + text) for line in lines)
        for artefact in ARTEFACTS.values():
            name = f"seed-0/{artefact}.safetensors"
            assert same_weights(out / name, finished / name)


@pytest.mark.slow
def test_a_failure_in_a_worker_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        in_processes(int, [("3",), ("x",)], at_once=2)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error() -> None:
    with pytest.raises(UserError, match="a process ended with status 9 before its work was done"):
        in_processes(os._exit, [(9,)])
