"""Code that a file names is not imported unless the user has given the name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from metacontroller import cli
from metacontroller.errors import UserError
from metacontroller.presets.offline import debug
from metacontroller.recipes.config import read_config, to_json
from metacontroller.storage.files import plain
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.user_function import is_code, refuse_unknown_code, trusting

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
