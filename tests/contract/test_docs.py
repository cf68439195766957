"""README and docs: snippets run, command lines parse, logged metrics are explained, files and links named exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metacontroller import cli
from metacontroller.presets import preset
from metacontroller.recipes.run_phase import run_phase
from metacontroller.report.tables import RESULTS
from metacontroller.storage.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "metacontroller"
ARCHITECTURE = "docs/architecture.md"
"""Its Python blocks are files of a package, its commands run on them."""
WALK_THROUGH = {
    "docs/phases/pretraining.md": "pretrain",
    "docs/phases/discovery.md": "discover",
    "docs/phases/internal-rl.md": "internal_rl",
}
PAGES = ["README.md", "CHANGELOG.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
PRESENT = [page for page in PAGES if page not in ("CHANGELOG.md", "docs/log.md") and "results" not in page]
"""Pages about the code as it is; the others also name what it was."""


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def command_lines(program: str, pages: list[str]) -> Iterator[str]:
    """Every line of every shell block that calls the program, without its comment."""
    for page in pages:
        for block in blocks(page, "shell"):
            yield from (line.partition("#")[0].strip() for line in block.splitlines() if line.startswith(f"{program} "))


def run_page(page: str) -> dict[str, Any]:
    """Runs a page's Python blocks one after the other, as a reader would; what they have defined."""
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


def explained(names: set[str], page: str) -> bool:
    """Whether each name stands in the first column of a table of the page."""
    cells = " ".join(re.findall(r"^\| (.*?) \|", (ROOT / page).read_text(), re.MULTILINE))
    missing = {name for name in names if f"`{name}`" not in cells}
    assert missing == set(), page
    return True


# -- snippets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in (*WALK_THROUGH, ARCHITECTURE) and blocks(page, "python")]
)
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
    files = {path.name for path in (tmp_path / "runs" / "example").iterdir()}
    assert {"base_model.safetensors", "meta_controller.safetensors", "internal_rl_policy.safetensors"} <= files
    assert "steps of the environment under one code" in capsys.readouterr().out
    for page, phase in WALK_THROUGH.items():
        logged = {name for line in RunFolder("runs/example").read_metrics(phase) for name in line} - {"phase", "step"}
        assert logged
        assert explained(logged, page)


def test_the_example_of_a_package_runs(tmp_path: Path) -> None:
    for block in blocks(ARCHITECTURE, "python"):
        path = tmp_path / block.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block)
    (points,) = blocks(ARCHITECTURE, "toml")  # as an installation of the package would leave them
    (tmp_path / "my_package-1.dist-info").mkdir()
    points = points.replace("[project.entry-points.", "[").replace('"', "")
    (tmp_path / "my_package-1.dist-info" / "entry_points.txt").write_text(points)
    lines = list(command_lines("metacontroller", [ARCHITECTURE]))
    assert {"pretrain", "entropy"} <= {line.split()[1] for line in lines}
    script = "import shlex, sys\nfrom metacontroller.cli import main\n"
    script += "for line in sys.argv[1:]:\n    assert main([*shlex.split(line)[1:], '--device', 'cpu']) == 0, line\n"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    # in a process of its own, since what registers itself stays registered
    done = subprocess.run([sys.executable, "-c", script, *lines], **options)
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "runs" / "corridor")
    assert run.read_analysis("action-entropy")["entropy"] > 0
    assert all(line["price"] > 0 for line in run.read_metrics("discover"))
    assert RunFolder(tmp_path / "runs" / "gru").read_config()["model"]["name"] == "gru"


# -- commands ---------------------------------------------------------------------------------------------------------

COMMAND_PAGES = [page for page in PAGES if page != ARCHITECTURE]


@pytest.mark.parametrize("line", sorted(set(command_lines("metacontroller", COMMAND_PAGES))))
def test_a_command_line_parses(line: str) -> None:
    program, command, *options = shlex.split(line)
    assert program == "metacontroller"
    expected = cli.COMMANDS[command].load()
    parsed = type(cli.parse([command, *options]))  # an analysis' class is made anew each time
    assert (parsed.__name__, parsed.__doc__) == (expected.__name__, expected.__doc__)


def test_every_command_is_shown() -> None:
    assert {line.split()[1] for line in command_lines("metacontroller", COMMAND_PAGES)} == set(cli.COMMANDS)


def test_make_knows_the_targets_shown() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {line.split()[1] for line in command_lines("make", PAGES)}
    shown |= {target for page in PRESENT for target in re.findall(r"`make ([a-z-]+)`", (ROOT / page).read_text())}
    assert {"reproduce", "test"} <= shown <= targets


# -- words ------------------------------------------------------------------------------------------------------------


def test_the_metrics_of_compile_are_explained(tmp_path: Path) -> None:
    config = replace(preset("debug"), discovery="compile")
    for phase in ("pretrain", "discover"):
        run_phase(phase, config, tmp_path, True, "cpu")
    logged = {name for line in RunFolder(tmp_path).read_metrics("discover") for name in line} - {"phase", "step"}
    assert "code_kl" in logged
    assert explained(logged, "docs/study.md")


def test_the_measures_of_a_run_are_explained() -> None:
    assert explained({*RESULTS, "code_subgoal_share"}, "docs/glossary.md")


def test_the_map_names_every_package_and_no_file_that_is_not_there() -> None:
    tree = (ROOT / ARCHITECTURE).read_text().partition("## Layout")[2].partition("```\n")[2].partition("```")[0]
    inside = tree.partition("\ntests/")[0]
    files = {path.name for path in SOURCE.rglob("*") if path.is_file()}
    assert set(re.findall(r"\w+\.(?:py|html)", inside)) <= files
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == set(re.findall(r"^  (\w+)/", inside, re.MULTILINE))


@pytest.mark.parametrize("page", PRESENT)
def test_files_of_the_source_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`([a-z_/]+/\w+\.(?:py|html|md))`", (ROOT / page).read_text())
    places = (SOURCE, ROOT, ROOT / "docs")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
