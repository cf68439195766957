"""Code that a file names is not imported unless the user has given the name."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metacontroller import cli
from metacontroller.data.datasets import load_dataset
from metacontroller.domains import guarded_environment
from metacontroller.errors import UserError
from metacontroller.presets import preset
from metacontroller.presets.offline import debug
from metacontroller.recipes.config import read_config, to_json
from metacontroller.storage import user_function
from metacontroller.storage.files import plain
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.user_function import (
    code_name,
    import_user_function,
    import_user_module,
    refuse_unknown_code,
    remember_code,
    trusting,
)

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
    for words in (["--trust", NAME], [f"--trust={NAME}"]):
        assert cli.main(["discover", str(strangers), *words]) == 2
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
    assert all(map(code_name, ("a:b", "package.module:function", "package:Env-v0", "package:space/Env-v0", "a.b:c.d")))
    others = ("CartPole-v1", "D4RL/door/human-v2", "/data/mine", "C:\\data", "C:/data", "./a:b", "", 3, None)
    assert not any(map(code_name, others))
    assert not any(
        map(code_name, ("a:b c", "a:b:c", "a:b/c/d", "a:b()", " a:b", "a:b ", "a:b\n", "a..b:c", "1a:b", "é:b"))
    )
    with pytest.raises(UserError, match="names x:y"):
        refuse_unknown_code({"a": [1, {"b": ["x:y"]}]}, Path("file"))


OWN: str = """
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


def test_a_function_that_takes_other_arguments_is_shown_as_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_narrow.py").write_text("def act(observation):\n    return 0\n")
    words = ["--env", "CartPole-v1", "--policy", "own_narrow:act", "--episodes", "1", "--out", "data", "--quiet"]
    assert cli.main(["collect", *words]) == 2
    told = capsys.readouterr().err
    assert "policy 'own_narrow:act' raised TypeError: act() takes 1 positional argument but 2 were given (" in told
    assert told.endswith("own_narrow.py); mend it there.\n")


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


def test_a_file_of_that_name_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x:y").touch()
    with pytest.raises(UserError, match="names x:y"):
        refuse_unknown_code(["x:y"], Path("file"))


def test_names_are_found_however_deep() -> None:
    content: object = "x:y"
    for _ in range(10_000):
        content = [content]
    with pytest.raises(UserError, match="names x:y"):
        refuse_unknown_code(content, Path("file"))


# -- what is imported is what was recognised -------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"\A[\w.]{1,6}:[\w./ -]{1,6}\Z"),
    st.text("ab_.:/ -0\u00e9\uff41\u0130\n\x00", max_size=10),
)


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_only_what_is_recognised_is_imported(text: str) -> None:
    """By any of the importers, and whatever it is that they would have imported."""
    imported: list[str] = []

    def instead(name: str, *_: object) -> None:
        imported.append(name)
        raise ModuleNotFoundError(name=name)

    importers: list[Callable[[str], object]] = [
        lambda name: import_user_function("policy", name),
        load_dataset,
        preset,
        guarded_environment.environment_id.__wrapped__,
    ]
    for importer in importers:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guarded_environment, "_modules_on_gymnasium", lambda name: [])
            patch.setattr(user_function, "import_module", instead)
            patch.setattr(importlib, "import_module", instead)
            with suppress(UserError, OSError, ValueError):
                importer(text)
    code = code_name(text)
    assert set(imported) <= ({code.module} if code else set())
    assert bool(imported) == bool(code)


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_whatever_is_recognised_needs_trust(text: str) -> None:
    try:
        refuse_unknown_code({"domain": [{"dataset": text}]}, Path("nowhere") / "config.json")
    except UserError:
        assert code_name(text) is not None
    else:
        assert code_name(text) is None


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXTS, max_size=3), st.sampled_from(["x:y", "other:z"]))
def test_words_of_a_command_line_trust_themselves_alone(words: list[str], name: str) -> None:
    with trusting(words):
        try:
            refuse_unknown_code(name, Path("nowhere") / "config.json")
        except UserError:
            assert name not in words
        else:
            assert name in words


@pytest.mark.parametrize("torn", ['["/somewhere", "a', "5", "{}", '["/x", 3]', "\udcff"])
def test_a_torn_note_makes_the_others_no_worse(torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    remember_code(["x:y"], tmp_path / "before")
    with (tmp_path / "metacontroller" / "own_code.jsonl").open("a", errors="surrogateescape") as file:
        file.write(torn)  # and a kill
    remember_code(["x:y"], tmp_path / "after")
    for folder in ("before", "after"):
        refuse_unknown_code(["x:y"], tmp_path / folder / "config.json")
    with pytest.raises(UserError, match="names x:y"):
        refuse_unknown_code(["x:y"], tmp_path / "elsewhere" / "config.json")
