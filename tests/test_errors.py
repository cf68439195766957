from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest

import metacontroller
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpadConfig
from metacontroller.errors import MissingFileError, UserError
from metacontroller.storage.run_folder import RunFolder


def test_a_mistake_is_a_value_error_too() -> None:
    with pytest.raises(UserError, match="epsilon is 2; expected a probability") as caught:
        GridworldPinpadConfig(epsilon=2)
    assert isinstance(caught.value, ValueError)


def test_a_missing_file_is_a_mistake_and_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"has no config\.json") as caught:
        RunFolder(tmp_path).read_config()
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, FileNotFoundError)
    assert str(copy.copy(caught.value)) == str(caught.value)  # as a worker process hands it to its parent


def test_all_sentences_to_the_user_are_of_this_type() -> None:
    """A plain ValueError or FileNotFoundError would reach the user as a traceback."""
    plain = [
        f"{path.name}:{node.lineno}"
        for path in Path(metacontroller.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        if node.exc.func.id in ("ValueError", "FileNotFoundError")
    ]
    assert plain == []
