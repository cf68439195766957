"""What the page for users of the other library says of its faults holds here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import metacontroller
from metacontroller.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "from-metacontroller-pytorch.md"


def test_the_page_begins_with_the_line_that_errors_name() -> None:
    first, rest = PAGE.read_text().split("\n\n", 2)[1:]
    assert "`metacontroller.metacontroller`" in first
    theirs: dict[str, Any] = {"switch_temperature": 0.1}
    with pytest.raises(UserError) as refused:
        metacontroller.MetaController(8, **theirs)
    assert rest.startswith(f"```shell\n{'sed' + str(refused.value).split('sed')[1]}\n```")
    assert "checked against\n0.3.3" in rest


def test_the_faults_are_not_ours() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["off_diagonal"] > 1e-6
    assert names["collected"] == 0
    assert names["learning"] == len(list(names["model"].lower_body.parameters()))
    assert names["raised"] is None
    assert names["loss"].isfinite()
