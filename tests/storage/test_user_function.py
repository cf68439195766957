"""Code that a file names is not imported unless the user has given the name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from metacontroller import cli
from metacontroller.errors import UserError
from metacontroller.presets.offline import debug
from metacontroller.recipes.config import read_config, to_json
from metacontroller.storage.files import plain
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.user_function import import_user_module, is_code, refuse_unknown_code, trusting

NAME = "stranger_module:make"


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose config names a module that leaves a trace when it is imported."""
    content = to_json(debug())
    content["domain"] = {**content["domain"], "dataset": NAME}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(content, default=plain))
    (tmp_path / "stranger_module.py").write_text("open('trace', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("command", [["discover"], ["internal-rl"], ["evaluate"], ["probe"], ["reproduce", "--resume"]])
def test_a_strangers_run_folder_runs_no_code(
    strangers: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    words = [*command, *(["--out"] if command[0] == "reproduce" else []), str(strangers)]
    assert cli.main(words) == 2
    assert f"config.json names {NAME}, a module that would be imported" in capsys.readouterr().err
    assert not Path("trace").exists()


def test_a_name_that_the_user_gives_is_imported(strangers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--trust", NAME], [f"--trust={NAME}"]):
        assert cli.main(["discover", str(strangers), *given]) == 2
        assert "config.json names" not in capsys.readouterr().err
    with trusting([NAME]):
        assert read_config(RunFolder(strangers)).domain.dataset == NAME
    with pytest.raises(UserError, match=f"add --trust {NAME} to the command"):
        read_config(RunFolder(strangers))
    assert cli.main(["discover", str(strangers), "--trust"]) == 2
    assert "--trust stands before no name" in capsys.readouterr().err


def test_a_config_that_this_user_wrote_may_name_code_and_a_copy_of_it_may_not(
    strangers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = RunFolder(tmp_path / "own")
    own.write_config(json.loads((strangers / "config.json").read_text()))
    assert read_config(own).domain.dataset == NAME
    shutil.copytree(own.path, own.path / "seed-0")
    assert read_config(RunFolder(own.path / "seed-0")).domain.dataset == NAME  # below it, as in a sweep
    shutil.copytree(own.path, tmp_path / "copied")
    for other in (RunFolder(tmp_path / "copied"), RunFolder(strangers)):
        with pytest.raises(UserError, match=f"add --trust {NAME}"):
            read_config(other)


def test_where_nothing_can_be_noted_names_are_given_again(
    strangers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    own = RunFolder(tmp_path / "own")
    own.write_config(json.loads((strangers / "config.json").read_text()))
    with pytest.raises(UserError, match=f"add --trust {NAME}"):
        read_config(own)


def test_what_counts_as_code() -> None:
    assert all(map(is_code, ("a:b", "package.module:function", "package:Env-v0", "a.b:c.d")))
    assert not any(map(is_code, ("CartPole-v1", "D4RL/door/human-v2", "/data/mine", "C:\\data", "", 3, None)))
    with pytest.raises(UserError, match="names x:y"):
        refuse_unknown_code({"a": [1, {"b": ["x:y"]}]}, Path("file"))


OWN = """
import sys


def fails(*arguments):
    return 1 + None


def leaves(*arguments):
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [("fails", "raised TypeError: unsupported operand"), ("leaves", "raised SystemExit: 3")],
)
def test_what_code_of_the_user_raises_is_shown_as_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], function: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"own_{function}.py").write_text(OWN)
    name, line = f"own_{function}:{function}", OWN.splitlines().index(f"def {function}(*arguments):") + 2
    for words in (
        ["pretrain", "run", "--preset", name],
        ["pretrain", "run", "--dataset", name],
        ["collect", "--env", "CartPole-v1", "--policy", name, "--episodes", "1", "--out", "data", "--quiet"],
    ):
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert f"metacontroller: {words[2 + (words[0] == 'collect')].removeprefix('--')} '{name}' {said}" in told
        assert f"own_{function}.py, line {line}); mend it there." in told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("def", "raised SyntaxError: invalid syntax"),
        ("raise SystemExit", "raised SystemExit ("),
        ("import no_such_package", "needs the module no_such_package, which is not installed"),
    ],
)
def test_a_module_that_cannot_be_imported_is_shown_as_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_module.py").write_text(f"\n{content}\n")
    for what in ("policy", "env"):
        with pytest.raises(UserError, match=f"^{what} 'broken_module:make'") as caught:
            import_user_module(what, "broken_module:make")
        assert said in str(caught.value)
        assert "needs" in said or f"{tmp_path / 'broken_module.py'}, line 2)" in str(caught.value)
