"""The notebooks of docs/notebooks: their code cells run one after the other, at small sizes, without Jupyter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
SMALL = {
    "your_own_environment": """
EPISODES = 20
SIZES = ["--preset=offline-debug", "--config.internal-rl.episodes=8", "--config.evaluate.episodes=4", "--device=cpu"]
QUIET = ["--quiet"]
"""
}
"""In place of the cell that is tagged "sizes", by notebook."""


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_results(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in cells(path, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(path, "code"):
        tagged = "sizes" in cell["metadata"].get("tags", [])
        source = SMALL[path.stem] if tagged else "".join(cell["source"])
        exec(compile(source, f"{path.name}: {cell['id']}", "exec"), names)
    assert "internal RL" in (tmp_path / "yard.html").read_text(encoding="utf-8")
    assert names["info"]["steps"] >= 1
    assert names["ended"]


def test_no_demonstration_shows_a_step_of_the_task() -> None:
    (path,) = NOTEBOOKS
    names: dict[str, Any] = {"EPISODES": 300}
    for cell in cells(path, "code")[1:3]:
        source = "".join(cell["source"]).replace('data.write("data/yard")', "")
        exec(compile(source.replace("Yard-v0", "ShownYard-v0"), cell["id"], "exec"), names)
    assert not set(zip(names["TASK"], names["TASK"][1:], strict=False)) & set(names["SHOWN"])
    for seed in range(40):
        episode = names["demonstrate"](seed)
        if episode is not None:
            offsets = episode["states"].reshape(-1, 3, 2)
            touched = [int(place) for _, place in zip(*(abs(offsets[1:]).sum(-1) == 0).nonzero(), strict=True)]
            assert tuple(touched) in names["SHOWN"]
