from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from helpers import quick_reproductions
from metacontroller import cli
from metacontroller.analysis import registry
from metacontroller.baselines.compile import build_compile, discover_compile
from metacontroller.baselines.raw_action_rl import raw_action_rl
from metacontroller.domains.registry import domain_of
from metacontroller.errors import UserError
from metacontroller.phases.discover import discover
from metacontroller.phases.internal_rl import internal_rl
from metacontroller.phases.pretrain import pretrain
from metacontroller.presets.gridworld import debug, laptop
from metacontroller.recipes.config import build_meta_controller, build_model, from_json, read_config, to_json, with_seed
from metacontroller.recipes.run_phase import demonstrations, post_training, run_pretrain
from metacontroller.storage.run_folder import RunFolder

QUIET = ["--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every phase of the debug preset done, command by command."""
    path = str(tmp_path_factory.mktemp("cli") / "run")
    steps = ["--config.pretrain.optimizer.steps", "8"]
    assert cli.main(["pretrain", path, "--preset", "debug", "--seed", "3", *steps, *QUIET]) == 0
    assert cli.main(["discover", path, *QUIET]) == 0
    assert cli.main(["internal-rl", path, *QUIET]) == 0
    assert cli.main(["internal-rl", path, "--raw", *QUIET]) == 0
    small = ["--evolution.generations", "2", "--evolution.population", "4", "--evolution.episodes", "2"]
    assert cli.main(["evolve", path, *small, *QUIET]) == 0
    return Path(path)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command line says when it ends with status 2."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.replace("│", " ").split())


def test_the_phases_leave_their_artefacts_and_the_whole_config(run: Path) -> None:
    artefacts = ("base_model", "meta_controller", "internal_rl_policy", "raw_action_model", "evolved_policy")
    assert all((run / f"{name}.safetensors").is_file() for name in artefacts)
    config = from_json(json.loads((run / "config.json").read_text()))
    assert config.pretrain.optimizer.steps == 8
    assert config.seed == 3
    assert config == with_seed(config, 3)
    assert config.model == debug().model


@pytest.mark.parametrize("policy", ["base", "raw", "prior", "internal-rl", "evolved"])
def test_evaluate_prints_json(run: Path, capsys: pytest.CaptureFixture[str], policy: str) -> None:
    argv = ["evaluate", str(run), "--episodes", "20", "--seed", "7", "--json", "--policy", policy, "--task", "0-3-2"]
    assert cli.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    keys = {"run", "policy", "task", "episodes", "success", "success_se", "mean_return", "return_se"}
    keys |= {"subgoals", "steps", "decisions"}
    if policy not in ("base", "raw"):
        keys |= {"gate_recall", "gate_precision", "gate_binary_fraction", "code_subgoal_bits"}
    assert set(result) == keys
    assert (result["policy"], result["task"], result["episodes"]) == (policy, "0-3-2", 20)


def test_evaluate_takes_task_and_episodes_from_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--policy", "base"]) == 0
    text = capsys.readouterr().out
    assert "0-1" in text
    assert "64" in text
    assert "success_se" in text


def test_evaluate_of_a_reproduction_lists_its_seeds_in_order(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (10, 2):
        shutil.copytree(run, tmp_path / f"seed-{seed}")
    assert cli.main(["evaluate", str(tmp_path), "--policy", "base", "--episodes", "4", "--json"]) == 0
    assert [result["run"] for result in json.loads(capsys.readouterr().out)] == ["seed-2", "seed-10"]


def test_reproduce_prints_a_table_and_where_the_figures_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with quick_reproductions():
        assert cli.main(["reproduce", "--preset", "debug", "--out", str(out), "--seeds", "5", *QUIET]) == 0
    text = capsys.readouterr().out
    assert "internal RL: success" in text
    assert f"Figures: {out / 'figures'}" in text
    assert RunFolder(out).read_summary()["seeds"] == [5]


def test_an_interrupt_ends_with_130_and_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "run")
    save = RunFolder.save_checkpoint
    with monkeypatch.context() as patch:

        def save_and_stop(self: RunFolder, *arguments: object) -> Path:
            save(self, *arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        patch.setattr(RunFolder, "save_checkpoint", save_and_stop)
        assert cli.main(["pretrain", path, "--preset", "debug", *QUIET]) == 130
    resuming = f"metacontroller pretrain {path} --preset debug {' '.join(QUIET)} --resume"
    assert capsys.readouterr().err == f"metacontroller: stopped by SIGINT; go on with: {resuming}\n"
    assert cli.main(["pretrain", path, "--resume", *QUIET]) == 0  # the run's own config, not the laptop's
    assert RunFolder(path).load_checkpoint("pretrain")[1]["step"] == debug().pretrain.optimizer.steps


def test_a_begun_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "pretrain", str(run), "--preset", "debug")
    assert said == f"metacontroller: {run} holds a run; add --resume to resume it, or choose another folder."
    for command in (["discover"], ["internal-rl"], ["internal-rl", "--raw"]):
        said = refusal(capsys, command[0], str(run), *command[1:])
        assert said.endswith("a checkpoint of this phase; resume it (resume=True, --resume) or choose another folder.")


def test_python_does_not_overwrite_a_begun_phase_either(tmp_path: Path) -> None:
    config, run = replace(debug(), discovery="compile"), RunFolder(tmp_path)
    model, acting = build_model(config), build_meta_controller(config)
    domain = domain_of(config.domain)
    segmentation = build_compile(config.compile, model, domain.spec().encoder, acting.dim_latent, 0)
    source, reset = demonstrations(domain, "discover"), post_training(domain)
    quiet: dict[str, Any] = {"quiet": True}
    on_cpu: dict[str, Any] = {"resume": False, "quiet": True, "device": "cpu"}
    calls: dict[str, list[Callable[[], Any]]] = {
        "pretrain": [
            lambda: pretrain(config.pretrain, model, source, run, **quiet),
            lambda: run_pretrain(config, run, **on_cpu),
        ],
        "discover": [
            lambda: discover(config.discover, model, acting, source, run, **quiet),
            lambda: discover_compile(config.compile, model, segmentation, acting, source, run, **quiet),
        ],
        "internal_rl": [lambda: internal_rl(config.internal_rl, model, acting, reset, run, **quiet)],
        "raw_action_rl": [lambda: raw_action_rl(config.raw_action_rl, model, reset, run, **quiet)],
    }
    for phase in calls:
        run.save_checkpoint(phase, {}, {})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for phase, ways in calls.items():
        for call in ways:
            with pytest.raises(ValueError, match=rf"{tmp_path} holds {phase}\.safetensors, .*resume=True.* or choose"):
                call()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_made_from_python_is_one_for_the_commands_once_it_has_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = debug(), RunFolder(tmp_path)
    domain, acting = domain_of(config.domain), build_meta_controller(config)
    model = pretrain(config.pretrain, build_model(config), demonstrations(domain, "pretrain"), run, quiet=True)
    discover(config.discover, model, acting, demonstrations(domain, "discover"), run, quiet=True)
    words = ["evaluate", str(tmp_path), "--policy", "prior", "--episodes", "4", "--json", "--device", "cpu"]
    said = refusal(capsys, *words)
    mending = f"RunFolder({str(tmp_path)!r}).write_config(to_json(config))"
    assert said.endswith(f"or write the config of a run made from Python by {mending}.")
    exec(mending, {"RunFolder": RunFolder, "to_json": to_json, "config": config})
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "prior"


def test_a_resumed_run_keeps_its_config(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "pretrain", str(run), "--preset", "debug", "--resume")
    assert "was started with another configuration; leave out --preset and --config" in said
    said = refusal(capsys, "pretrain", str(run), "--seed", "4", "--resume")
    assert "was started from seed 3, not 4" in said


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["discover", "{new}"], "has no config.json; name the folder of a run that has been started, or"),
        (["evaluate", "{run}", "--task", "0-7"], "task 0-7 has unknown color 7"),
        (["evaluate", "{run}", "--task", "blue"], "task 'blue' is not a list of colors"),
        (["evaluate", "{run}", "--episodes", "0"], "episodes is 0; expected at least 1."),
        (["evaluate", "{run}", "--seed", "-1"], "seed is -1; expected 0.."),
        (["pretrain", "{new}", "--config.model.dim", "0"], "dim is 0; expected at least 1."),
        (
            ["pretrain", "{new}", "--preset", "debug", "--config.domain.tasks", "0-1", "0-9"],
            "task 0-9 has unknown color 9",
        ),
        (["pretrain", "{new}", "--config.pretrain.seed", "4"], "change that with --seed or --seeds."),
        (["pretrain", "{new}", "--preset", "desktop"], "preset 'desktop' is unknown; known are"),
        (["pretrain", "{new}", "--preset", "no_such_package:mine"], "names no module that can be imported"),
        (["reproduce", "--out", "{new}", "--workers", "0"], "workers is 0; expected at least 1."),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_mistake_is_answered_with_its_mending(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    new = tmp_path / "new"
    said = refusal(capsys, *(word.format(run=run, new=new) for word in argv))
    assert sentence in said
    assert not new.exists()


def test_a_bug_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(*_: object) -> None:
        raise ValueError("expected a non-empty list of Tensors")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(ValueError, match="non-empty list"):
        cli.main(["pretrain", str(tmp_path / "run"), "--preset", "debug", *QUIET])


def test_a_mistake_found_inside_a_phase_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def clip(*_: object) -> None:
        raise UserError("lr is 9; expected less.")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert cli.main(["pretrain", str(tmp_path / "run"), "--preset", "debug", *QUIET]) == 2
    assert capsys.readouterr().err == "metacontroller: lr is 9; expected less.\n"


@pytest.mark.parametrize("command", [["pretrain", "{new}", "--preset", "debug"], ["discover", "{run}"]])
def test_a_gpu_that_is_not_there_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [word.format(run=run, new=tmp_path / "new") for word in command]
    assert cli.main([*words, "--device", "cuda", "--quiet"]) == 2
    captured = capsys.readouterr()
    sentence = "device is cuda, but PyTorch finds no GPU here; give --device cpu or leave it out."
    assert (captured.out, captured.err) == ("", f"metacontroller: {sentence}\n")
    assert not (tmp_path / "new").exists()


def test_a_phase_without_what_it_needs_names_the_phase_to_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "run `metacontroller pretrain` on it first" in refusal(capsys, "discover", str(tmp_path))
    shutil.copy(run / "base_model.safetensors", tmp_path)
    assert "run `metacontroller discover` on it first" in refusal(capsys, "internal-rl", str(tmp_path))
    assert "run `metacontroller internal-rl` on it first" in refusal(capsys, "evaluate", str(tmp_path))
    raw = refusal(capsys, "evaluate", str(tmp_path), "--policy", "raw")
    assert "run `metacontroller internal-rl --raw` on it first" in raw


def test_the_preset_decides_the_defaults_of_all_options() -> None:
    command = cli.parse(
        ["reproduce", "--preset=debug", "--config.domain.tasks", "0-1", "2-3-2", "--config.domain.post-task", "3-0"]
    )
    assert command.config.domain.tasks == ((0, 1), (2, 3, 2))
    assert command.config.domain.post_task == (3, 0)
    assert command.config.model == debug().model
    assert cli.parse(["reproduce"]).config == laptop()


def test_only_tasks_are_read_as_tasks(tmp_path: Path) -> None:
    snapshots = ["--config.pretrain.snapshots", "4", "8"]
    tasks = ["--config.domain.tasks", "0-1", "1-2", "--config.domain.post-task", "0-1"]
    config = cli.parse(["pretrain", "run", "--preset", "debug", *snapshots, *tasks]).config
    assert config.pretrain.snapshots == (4, 8)
    assert config.domain.tasks == ((0, 1), (1, 2))
    assert config.domain.post_task == (0, 1)
    RunFolder(tmp_path).write_config(to_json(config))
    assert read_config(RunFolder(tmp_path)) == config


def test_help_names_every_command_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["reproduce", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--seeds", "--workers", "--resume", "--config.discover.alpha"))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_overview_says_what_a_command_says_of_itself(command: str) -> None:
    kind = cli.COMMANDS[command].load()
    assert cli.COMMANDS[command].summary == kind.__doc__.splitlines()[0]


def test_an_analysis_of_another_package_is_a_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "counting.py").write_text(
        """
from dataclasses import dataclass
from metacontroller.analysis.registry import Analysis, analysis

@analysis("counts", command="count", figure="none")
class Counts(Analysis):
    'Count what there is to count.'

    @dataclass(frozen=True, kw_only=True)
    class Config:
        twice: bool = False
        'Count it twice.'

    def measure(self, run, config, *, quiet=False):
        return {"subgoals": len(run.subgoals) * (2 if config.twice else 1)}
"""
    )
    (tmp_path / "counting-1.dist-info").mkdir()
    points = "[metacontroller.analyses]\ncounts = counting:Counts\n"
    (tmp_path / "counting-1.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    folder = shutil.copytree(run, tmp_path / "run")
    assert cli.main(["count", str(folder), "--twice", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "run", "subgoals": 8}
    assert RunFolder(folder).read_analysis("counts") == {"subgoals": 8}
    assert "invalid choice: 'counts'" in refusal(capsys, "counts")


def test_the_overview_does_not_wait_for_torch() -> None:
    script = """
import sys
from metacontroller import cli
for words in (["--help"], ["--version"], ["frobnicate"], []):
    try:
        cli.main(words)
    except SystemExit as stop:
        print("status", stop.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == [f"status {status} False" for status in (0, 0, 2, 2)]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"metacontroller {metadata.version('metacontroller-rl')}\n"


def field_texts(kind: type, default: Any = None) -> dict[str, str]:
    """Every option of a dataclass and of those in it, and what is written below its field, "" where nothing is.

    default: an instance, which says what a field of any type holds.
    """
    texts: dict[str, str] = {}
    for cls in reversed([cls for cls in kind.__mro__ if is_dataclass(cls)]):
        if hasattr(kind, "analysis") and cls is kind:  # made from an analysis, whose Config has the options
            texts |= field_texts(kind.analysis.Config)
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        below = dict(zip(tree.body, tree.body[1:], strict=False))
        hints, names = get_type_hints(cls), {field.name for field in fields(cls)}
        for line in tree.body:
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id in names):
                continue
            name, next_line = line.target.id, below.get(line)
            texts.setdefault(name, "")  # a subclass with another default keeps the text
            if isinstance(next_line, ast.Expr) and isinstance(next_line.value, ast.Constant):
                texts[name] = str(next_line.value.value)
            value = getattr(default, name, None)
            inner = type(value) if hints[name] is Any else hints[name]
            if is_dataclass(inner):
                texts |= {f"{name}.{option}": text for option, text in field_texts(inner, value).items()}
    return texts


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_a_text_for_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    shown = re.sub(r"\W+", "", capsys.readouterr().out)  # without boxes and where lines end
    kind = cli.COMMANDS[command].load()
    defaults = getattr(kind, "defaults", lambda _: None)
    texts = field_texts(kind, defaults([]))
    assert ("device" in texts) == (command != "collect")  # it trains nothing
    assert ("config.domain.tasks" in texts) == ("config.model.dim" in texts) == ("config.meta_controller.rank" in texts)
    configured = ("pretrain", "discover", "internal-rl", "reproduce", "figures", "sweep")
    assert ("config.meta_controller.gate.mode" in texts) == (command in configured)
    assert ("study.inject_walks" in texts) == (command == "figures")
    assert [name for name, text in texts.items() if not text or re.sub(r"\W+", "", text) not in shown] == []


def test_a_warning_for_users_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the file and the line of the source that gave it, which others keep."""
    shown: list[str] = []

    def command() -> None:
        for category in (UserWarning, DeprecationWarning):
            shown.append(warnings.formatwarning("as told", category, "there.py", 7, "a line"))

    monkeypatch.setattr(cli, "parse", lambda words: command)
    assert cli.main(["report"]) == 0
    command()  # outside of the command line, as ever
    assert shown[0] == "warning: as told\n"
    assert shown[1] == shown[3] == "there.py:7: DeprecationWarning: as told\n  a line\n"
    assert shown[2] == "there.py:7: UserWarning: as told\n  a line\n"
