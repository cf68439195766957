"""README and docs: every Python snippet runs, every command line parses, every logged metric is explained."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metacontroller import cli
from metacontroller.storage.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
WALK_THROUGH = {
    "docs/phases/pretraining.md": "pretrain",
    "docs/phases/discovery.md": "discover",
    "docs/phases/internal-rl.md": "internal_rl",
}
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def command_lines(program: str) -> Iterator[str]:
    """Every line of every shell block that calls the program, without its comment."""
    for page in PAGES:
        for block in blocks(page, "shell"):
            yield from (line.partition("#")[0].strip() for line in block.splitlines() if line.startswith(f"{program} "))


def run_page(page: str) -> dict[str, Any]:
    """Runs a page's Python blocks one after the other, as a reader would; what they have defined."""
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if page not in WALK_THROUGH and blocks(page, "python")])
def test_the_snippets_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(page)
    assert page != "README.md" or names["loss"].grad_fn is not None


def test_the_pages_of_the_phases_are_a_walk_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for page in WALK_THROUGH:
        run_page(page)
    made = {path.name for path in (tmp_path / "runs" / "example").iterdir()}
    assert {"base_model.safetensors", "meta_controller.safetensors", "internal_rl_policy.safetensors"} <= made
    assert "steps of the environment under one code" in capsys.readouterr().out
    for page, phase in WALK_THROUGH.items():
        logged = {name for line in RunFolder("runs/example").read_metrics(phase) for name in line} - {"phase", "step"}
        assert logged
        assert [name for name in logged if f"| `{name}` |" not in (ROOT / page).read_text()] == []


@pytest.mark.parametrize("line", sorted(set(command_lines("metacontroller"))))
def test_a_command_line_parses(line: str) -> None:
    program, command, *options = shlex.split(line)
    assert program == "metacontroller"
    assert type(cli.parse([command, *options])) is cli.COMMANDS[command].load()


def test_every_command_is_shown() -> None:
    assert {line.split()[1] for line in command_lines("metacontroller")} == set(cli.COMMANDS)


def test_make_knows_the_targets_shown() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {line.split()[1] for line in command_lines("make")}
    assert {"reproduce", "test"} <= shown <= targets
