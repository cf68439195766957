"""Bad command lines: each ends with its exit status and says which value is wrong and what was expected."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from metacontroller import cli
from metacontroller.commands.evaluate import Evaluate
from metacontroller.presets.gridworld import debug
from metacontroller.recipes.config import to_json
from metacontroller.storage.run_folder import RunFolder

PRETRAIN = ["pretrain", "new", "--preset", "debug", "--device", "cpu"]
COLLECT = ["collect", "--env", "CartPole-v1", "--policy", "json:dumps", "--episodes", "1", "--out", "new"]
OVER = ["--preset", "debug", "--out", "new"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command lines name: run, a run that has learned nothing, other, file, and bad, no UTF-8."""
    folder = tmp_path_factory.mktemp("commands")
    RunFolder(folder / "run").write_config(to_json(debug()))
    for name in ("other", "bad"):
        (folder / name).mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    (folder / "file").write_text("mine")
    (folder / "bad" / "config.json").write_bytes(b"\xff\xfe{}")
    return folder


def config(option: str, *values: str) -> list[str]:
    return [*PRETRAIN, f"--config.{option}", *values]


def evaluate(*words: str) -> list[str]:
    return ["evaluate", "run", "--device", "cpu", *words]


def collect(option: str, value: str) -> list[str]:
    words = list(COLLECT)
    if option in words:
        words[words.index(option) + 1] = value
        return words
    return [*words, option, value]


LINES: list[tuple[list[str], str]] = [
    ([], "the following arguments are required: COMMAND"),
    (["frobnicate"], "invalid choice: 'frobnicate'"),
    (["--frobnicate"], "arguments are required: COMMAND"),
    (["pretrain"], "Folder to make, or with --resume to continue in"),
    (["pretrain", "new", "more"], "Unrecognized options: more"),
    ([*PRETRAIN, "--frobnicate"], "Unrecognized options: --frobnicate"),
    ([*PRETRAIN, "--trust"], "--trust stands before no name; write --trust package.module:function"),
    ([*PRETRAIN, "--seed", "x"], "['x'] does not match"),
    ([*PRETRAIN, "--seed", "1.5"], "['1.5'] does not match"),
    ([*PRETRAIN, "--seed", "-1"], "seed is -1; expected 0..268435455"),
    ([*PRETRAIN, "--seed", "999999999999"], "seed is 999999999999; expected 0..268435455"),
    (
        [*PRETRAIN, "--device", "tpu"],
        "invalid choice 'tpu' for argument '--device'",
    ),
    ([*PRETRAIN, "--track", "mlflow"], "invalid choice 'mlflow' for argument '--track'"),
    ([*PRETRAIN, "--env", "Nowhere-v0"], "--env Nowhere-v0 stands beside no dataset; give --dataset ID"),
    (["pretrain", "new", "--preset"], "Missing value for argument '--preset'"),
    (["pretrain", "new", "--preset", "desktop"], "preset 'desktop' is unknown; known are"),
    (["pretrain", "new", "--preset", ""], "preset '' is unknown; known are"),
    (["pretrain", "new", "--preset", "json:dumps"], "name a function that takes none"),
    (["pretrain", "new", "--preset", "json:nothing"], "preset 'json:nothing' is no function of json"),
    (["pretrain", "new", "--dataset", "nowhere"], "dataset 'nowhere' is no folder, no package.module:function"),
    (["pretrain", "new", "--dataset", "nowhere:make"], "'nowhere:make' names no module that can be imported"),
    (["pretrain", "other", *PRETRAIN[2:]], "other holds files of something else; choose another folder"),
    (["pretrain", "run", *PRETRAIN[2:]], "run holds a run; add --resume to resume it"),
    (["pretrain", "run", "--seed", "3", "--resume"], "run was started from seed 0, not 3"),
    (["pretrain", "bad", "--resume"], "config.json is not valid JSON"),
    (config("seed", "4"), "change that with --seed or --seeds"),
    (config("frobnicate", "1"), "Unrecognized options: --config.frobnicate, 1"),
    (config("model.dim", "0"), "dim is 0; expected at least 1"),
    (config("model.dim", "2.5"), "invalid literal for int() with base 10: '2.5'"),
    (config("model.dim", "99999999"), "dim is 99999999; expected at most 65536"),
    (config("model.heads", "3"), "dim 16 is not a multiple of heads 3; change one of them"),
    (config("pretrain.optimizer.lr", "nan"), "lr is nan; expected a number above 0"),
    (config("pretrain.optimizer.lr", "inf"), "lr is inf; expected a number above 0"),
    (config("pretrain.optimizer.lr", "fast"), "could not convert string to float: 'fast'"),
    (config("pretrain.optimizer.steps", "0"), "steps is 0; expected at least 1"),
    (config("pretrain.optimizer.batch-size", "9999999"), "batch_size is 9999999; expected at most 1048576"),
    (config("pretrain.snapshots", "0"), "snapshots[0] is 0; expected at least 1"),
    (config("domain.size", "100000"), "size is 100000; expected at most 256"),
    (config("domain.tasks", "0-9"), "task 0-9 has unknown color 9: colors run from 0 to 3"),
    (config("domain.tasks"), "the list of tasks is empty: give at least one task"),
    (config("domain.post-task", "blue"), "task 'blue' is not a list of colors"),
    (config("domain.epsilon", "2"), "epsilon is 2.0; expected a probability between 0 and 1"),
    (config("domain.view", "above"), "invalid choice 'above'"),
    (config("discover.alpha", "-1"), "alpha is -1.0; expected a number of at least 0"),
    (config("discover.alpha-warmup", "5", "2"), "alpha_warmup is (5, 2); expected (from, to)"),
    (config("internal-rl.target-kl", "0"), "target_kl is 0.0; expected a number above 0, or none"),
    (config("internal-rl.minibatches", "7"), "batch_size 32 is not a multiple of minibatches 7"),
    (config("meta-controller.rank", "9999"), "meta_controller.rank is 9999; expected at most model.dim, 16"),
    (config("meta-controller.gate.threshold", "1"), "threshold is 1.0; expected a number between 0 and 1"),
    (config("discovery", "other"), "discovery is 'other'; expected one of 'compile', 'metacontroller'"),
    (["discover"], "Folder of a pretrained run"),
    (["discover", "nowhere"], "nowhere has no config.json; name the folder of a run that has been started"),
    (["discover", "file"], "file has no config.json; name the folder of a run"),
    (["discover", "bad"], "config.json is not valid JSON"),
    (["discover", "run", "--quiet"], "run `metacontroller pretrain` on it first"),
    (["discover", "run", "--preset", "debug"], "Unrecognized options: --preset, debug"),
    (["internal-rl", "nowhere"], "nowhere has no config.json"),
    (["internal-rl", "run", "--quiet"], "run `metacontroller pretrain` on it first"),
    (["internal-rl", "run", "--raw", "yes"], "Unrecognized options: yes"),
    (["evaluate", "nowhere"], "nowhere has no config.json"),
    (evaluate("--episodes", "x"), "['x'] does not match"),
    (evaluate("--episodes", "1e3"), "['1e3'] does not match"),
    (evaluate("--seed", "-1"), "seed is -1; expected 0..268435455"),
    (evaluate("--task", "blue"), "task 'blue' is not a list of colors"),
    (evaluate("--task", ""), "task '' is not a list of colors"),
    (evaluate("--policy", "best"), "invalid choice 'best' for argument '--policy'"),
    (evaluate("--policy", "base"), "run `metacontroller pretrain` on it first"),
    (evaluate("--video", "x.txt"), "video x.txt has the ending '.txt'; expected one of .mp4, .gif"),
    (["probe", "nowhere"], "nowhere has no config.json"),
    (["probe", "run", "--steps", "0"], "steps is 0; expected at least 1"),
    (["probe", "run", "--lr", "nan"], "lr is nan; expected a number above 0"),
    (["probe", "run", "--batch-size", "-1"], "batch_size is -1; expected at least 1"),
    (["steer", "run", "--episodes", "0"], "episodes is 0; expected at least 1"),
    (["inject", "run", "--walks", "99999999"], "walks is 99999999; expected at most 1048576"),
    (["gate", "run", "--episodes", "-3"], "episodes is -3; expected at least 1"),
    (["oracle", "run", "--episodes", "0"], "episodes is 0; expected at least 1"),
    (["episodes", "run", "--episodes", "x"], "invalid literal for int() with base 10: 'x'"),
    (["collect"], "--env"),
    (collect("--env", "Nowhere-v0"), "Nowhere-v0"),
    (collect("--policy", "nowhere:b"), "policy 'nowhere:b' names no module that can be imported"),
    (collect("--policy", "json"), "policy 'json' is of another form"),
    (collect("--policy", "json:nothing"), "policy 'json:nothing' is no function of json"),
    (collect("--episodes", "0"), "episodes is 0; expected at least 1"),
    (collect("--workers", "0"), "workers is 0; expected at least 1"),
    (collect("--seed", "-1"), "seed is -1; expected at least 0"),
    (collect("--success-return", "nan"), "success_return is nan; expected a finite number, or none"),
    (collect("--out", "other"), "other holds files of something else; choose another --out"),
    (["reproduce", *OVER, "--workers", "0"], "workers is 0; expected at least 1"),
    (["reproduce", *OVER, "--seeds"], "seeds are []; give at least one"),
    (["reproduce", *OVER, "--seeds", "1", "1"], "seeds are [1, 1]; give at least one, each once"),
    (["reproduce", *OVER, "--seeds", "-1"], "seeds[0] is -1; expected at least 0"),
    (["figures", *OVER, "--study.alphas", "nan"], "alphas[0] is nan; expected a number of at least 0"),
    (["figures", *OVER, "--study.few-seeds", "-1"], "few_seeds is -1; expected at least 0"),
    (["sweep", *OVER, "--alphas", "-1"], "alphas[0] is -1.0; expected a number of at least 0"),
    (["sweep", *OVER, "--lrs", "0"], "lrs[0] is 0.0; expected a number above 0"),
    (["sweep", *OVER, "--minutes", "0"], "minutes is 0; expected at least 1"),
    (["sweep", *OVER, "--engine", "cloud"], "invalid choice 'cloud' for argument '--engine'"),
    (["report"], "no folder was named; give that of a run"),
    (["report", "nowhere"], "nowhere holds no finished reproduction"),
]


def said(capsys: pytest.CaptureFixture[str], argv: list[str]) -> tuple[Any, str]:
    """The exit status of a command line and what it says, without boxes and where lines end."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return status, " ".join(captured.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("argv", "sentence"), LINES, ids=lambda part: " ".join(part)[-40:] if isinstance(part, list) else part
)
def test_bad_command_lines(
    folder: Path, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")
    status, text = said(capsys, argv)
    assert (status, sentence in text) == (2, True), text
    assert not (folder / "new").exists()


def test_there_are_as_many_as_promised() -> None:
    assert len({tuple(argv) for argv, _ in LINES}) >= 80


# -- what the system refuses ------------------------------------------------------------------------------------------

LONG = "x" * 300
IN_THE_WAY = [
    (["pretrain", "file", *PRETRAIN[2:]], "file cannot be used"),
    (["pretrain", "file/run", *PRETRAIN[2:]], "file/run cannot be used"),
    (["pretrain", LONG, *PRETRAIN[2:]], f"{LONG[:197]}... cannot be used"),
    (["discover", LONG], "choose a shorter path"),
    (collect("--out", "file"), "file cannot be used"),
]


@pytest.mark.parametrize(("argv", "sentence"), IN_THE_WAY)
def test_what_is_in_the_way_is_one_line(
    folder: Path, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    status, text = said(capsys, argv)
    assert (status, sentence in text) == (5, True), text
    assert text.startswith("metacontroller: ")
    assert text.count("metacontroller: ") == 1


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (OSError(errno.ENOSPC, "full", "a.json"), 4, "no space is left for a.json"),
        (OSError(errno.EFBIG, "large", "a.json"), 4, "no space is left for a.json"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 4, "no space is left for a file"),
        (
            PermissionError(errno.EACCES, "no", "a.json"),
            5,
            "a.json cannot be used (Permission denied); change",
        ),
        (OSError(errno.EROFS, "no", "a.json"), 5, "a.json cannot be used (Read-only file system); choose a place"),
        (OSError(errno.EMFILE, "no"), 5, "too many files are open"),
        (MemoryError(), 6, "there is not enough memory; lower batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 6, "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 6, "there is not enough memory"),
        (BrokenPipeError(errno.EPIPE, "gone"), 141, "what read the output has ended"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), 2, "a name or a file is not UTF-8"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: Exception, status: int, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Evaluate) -> None:
        raise error

    monkeypatch.setattr(Evaluate, "__call__", fail)
    found, text = said(capsys, ["evaluate", "run"])
    assert found == status
    assert text.startswith("metacontroller: ")
    assert sentence in text
    assert text.endswith(".")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "no", "a.json")])
def test_all_else_is_a_bug_with_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Evaluate) -> None:
        raise error

    monkeypatch.setattr(Evaluate, "__call__", fail)
    with pytest.raises(type(error)):
        cli.main(["evaluate", "run"])


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a file's size are those of Linux")
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands for a disk without space: the write fails in the middle of the file."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    steps = ["--config.pretrain.optimizer.steps", "2", "--quiet"]
    words = ["pretrain", str(tmp_path / "run"), *PRETRAIN[2:], *steps]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        status, text = said(capsys, words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, "no space is left for" in text) == (4, True), text
    assert [name for name in os.listdir(tmp_path / "run") if name.endswith(".tmp")] == []
    assert cli.main([*words, "--resume"]) == 0
