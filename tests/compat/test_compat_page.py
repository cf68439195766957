"""What the page for users of the other library says of its faults holds here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "from-metacontroller-pytorch.md"


def test_the_faults_are_not_ours() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["off_diagonal"] > 1e-6
    assert names["collected"] == 0
    assert names["learning"] == len(list(names["model"].lower_body.parameters()))
    assert names["raised"] is None
    assert names["loss"].isfinite()
