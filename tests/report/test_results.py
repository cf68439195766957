"""Results of another shape than the report's are refused by name, and whatever they say stays text."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from metacontroller import cli
from metacontroller.errors import UserError
from metacontroller.metrics.switch_alignment import HISTOGRAM_BINS
from metacontroller.report import html
from metacontroller.report.figures import save_figure, success_figure
from metacontroller.report.html import write_report
from metacontroller.report.results import read_results
from metacontroller.report.tables import RESULTS
from metacontroller.storage.run_folder import RunFolder

CURVE = [0.1, 0.5]
EPISODE = {
    "task": "a → b",
    "subgoals": [0, 1],
    "changes": [1],
    "gate": CURVE,
    "code": [[0.0, 1.0], [1.0, 0.0]],
    "belief": [[0.5, 0.5], [0.5, 0.5]],
    "frames": ["data:image/png;base64,AA=="],
}
STUDIED = {"seed": 0, "status": "finished", "value": 0.1, "rate": 0.2, "distortion": 0.3, "aligned": True}
MEASURED = {"internal_rl_success": 0.4, "gate_recall": 0.5, "gate_precision": 0.6}
FILES: dict[str, dict[str, Any]] = {
    "summary": {
        "seeds": [0],
        "task": "a-b",
        "episodes": 32,
        "seconds": [9.0],
        "peak_rss_mb": 100.0,
        "versions": {"torch": "2"},
        "hardware": {"cores": 2},
        **{name: [0.5] for name in RESULTS},
    },
    "study": {
        "jobs": [
            {**STUDIED, **MEASURED, "name": name, "group": "rate"}
            for name in ("rate-frozen-0.1", "compile", "epsilon-1")
        ],
        "seconds": 9.0,
    },
    "seed": {
        "seed": 0,
        "code_subgoal_share": [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]],
        "code_subgoal_bits": 0.7,
        "subgoals": ["a", "b"],
    },
    "probes": {"accuracy": CURVE, "over_training": {"steps": [0, 5], "accuracy": [CURVE, CURVE]}},
    "steering": {"success": CURVE},
    "gate": {
        "elsewhere": [0.1] * HISTOGRAM_BINS,
        "at_change": [0.1] * HISTOGRAM_BINS,
        "tolerance": [0, 1],
        **dict.fromkeys(("recall", "precision", "f1"), CURVE),
    },
    "injection": dict.fromkeys(("free", "forced", "free_unseen", "forced_unseen"), 0.4),
    "episodes": {"names": ["a", "b"], "every": 1, "episodes": [EPISODE]},
}
ROWS = ("success", "success_se", "mean_return", "return_se", "steps", "decisions")
EVALUATION = {"task": "a-b", "episodes": 8, "lost": 0, **dict.fromkeys(ROWS, 0.5)}


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    if name == "summary":
        RunFolder(folder).write_summary(content)
    elif name == "study":
        RunFolder(folder / "study").write_summary(content)
    elif name == "seed":
        RunFolder(folder / "seed-0").write_summary(content)
    else:
        RunFolder(folder / "seed-0").write_analysis(name, content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reproduction of one seed with all that a report shows, made up."""
    folder = tmp_path_factory.mktemp("results") / "made up"
    for run in (RunFolder(folder), RunFolder(folder / "seed-0")):
        run.write_config({"note": "</script><img src=x>"})
    RunFolder(folder / "study").write_config({"pretraining_steps": 5})
    for name, content in FILES.items():
        write(folder, name, content)
    run = RunFolder(folder / "seed-0")
    for step in (1, 2):
        run.log_metrics("pretrain", step, action_loss=1.0)
        run.log_metrics("discover", step, action_loss=1.0, kl=0.5)
        run.log_metrics("internal_rl", step, success=0.5, episodes=16 * step, **{"return": 1.0})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture(scope="module")
def drawn_quickly() -> Iterator[None]:
    """Figures are made, but not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_svg", lambda figure: f"<svg>{len(figure.axes)}</svg>")
        yield


class Tags(HTMLParser):
    """All tags of a page, with their attributes' names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, ...]] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, *sorted(name for name, _ in attrs)))


def places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all that is in JSON data."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [where, *(way for key, part in inside for way in places(part, (*where, key)))]


def changed(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    made = copy.copy(content)
    made[way[0]] = changed(content[way[0]], way[1:], value)
    return made


PLACES = [(name, way) for name, content in FILES.items() for way in places(content) if way]
EVIL = "</script><!--<script>\"'><img src=x onerror=alert(1)>$\\frac{$"
ODD = [EVIL, "$x^$", "", None, [], {}, [None], -1, 1.5, True, 10**400, 1e300, [[]], {"a": EVIL}]


def test_a_whole_reproduction_is_shown(whole: Path, tmp_path: Path, drawn_quickly: None) -> None:
    page = write_report([whole], tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4 + 4 + 3 + 3  # of the seed, its analyses, its study, and the player's panels
    assert "&lt;/script&gt;&lt;img src=x&gt;" in page


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(st.sampled_from(PLACES), st.sampled_from(ODD))
def test_whatever_a_file_holds_is_refused_by_name_or_shown_as_text(
    whole: Path, drawn_quickly: None, place: tuple[str, tuple[Any, ...]], value: Any
) -> None:
    name, way = place
    out = whole.parent / "report.html"
    write(whole, name, changed(FILES[name], way, value))
    refused = ""
    try:
        page = write_report([whole], out).read_text()
    except UserError as error:
        refused = str(error)
    finally:
        write(whole, name, FILES[name])
    if refused:
        file = "summary" if name in ("study", "seed") else name
        assert f"{file}.json says " in refused or "holds no finished reproduction" in refused
    else:
        assert not [found for found in Tags(page).found if "onerror" in found]
        assert page.count("</script>") == 2
        found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
        assert found is not None
        assert "<" not in found[1]
        json.loads(found[1])


MALFORMED: dict[str, tuple[str, tuple[Any, ...], Any, str]] = {
    "seeds of text": ("summary", ("seeds", 0), "0", "says seeds[0] is '0'; expected a whole number"),
    "no episodes": ("summary", ("episodes",), None, "says episodes is None; expected a whole number"),
    "seconds of text": ("summary", ("seconds",), "9", "says seconds is '9'; expected a list"),
    "a measure of text": ("summary", ("gate_recall", 0), "x", "says gate_recall[0] is 'x'; expected a number"),
    "a row of a study": ("study", ("jobs", 0), [], "says jobs[0] is []; expected an object"),
    "another subgoal": ("seed", ("subgoals",), ["a"], "says code_subgoal_share[0] is [0.1"),
    "no layers": ("probes", ("accuracy",), [], "says accuracy is []; expected a list of 1 entries"),
    "fewer layers": ("probes", ("over_training", "accuracy", 0), [0.1], "accuracy[0] is [0.1]; expected a list of 2"),
    "fewer bins": ("gate", ("at_change",), CURVE, f"expected a list of {HISTOGRAM_BINS} entries"),
    "a picture elsewhere": (
        "episodes",
        ("episodes", 0, "frames", 0),
        "http://x/y.png",
        "expected text that begins with",
    ),
    "a number beyond": ("injection", ("forced",), 10**400, "expected a number between"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_results_of_another_shape(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, way, value, said = MALFORMED[name]
    write(folder, file, changed(FILES[file], way, value))
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "report.html"), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_layers_of_two_seeds_fit_together(tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path / name) for name in ("a", "b")]
    runs[0].write_analysis("steering", {"success": [0.1, 0.2]})
    runs[1].write_analysis("steering", {"success": [0.1]})
    with pytest.raises(UserError, match=r"b/analyses/steering\.json says success is \[0\.1\]; expected a list of 2"):
        read_results(runs, "steering")


@pytest.mark.parametrize("key", EVALUATION)
def test_an_evaluation_of_text_and_of_nothing(key: str, tmp_path: Path, drawn_quickly: None) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_config({})
    run.log_metrics("pretrain", 1, action_loss=1.0)
    run.write_analysis("evaluation-prior", {**EVALUATION, key: EVIL})
    if key == "task":
        assert "onerror" not in write_report([run.path], tmp_path / "report.html").read_text()
    else:
        with pytest.raises(UserError, match=rf"evaluation-prior\.json says {key} is"):
            write_report([run.path], tmp_path / "report.html")
    if key in ROWS:
        run.write_analysis("evaluation-prior", {**EVALUATION, key: None})
        assert "None" not in write_report([run.path], tmp_path / "report.html").read_text()


@pytest.mark.parametrize("task", ["$x^$", "$\\frac{$", "a$b", "\\$", "<b>$$"])
def test_a_task_is_no_formula(task: str, tmp_path: Path) -> None:
    figure = success_figure([], task)
    figure.savefig(tmp_path / "x.png")
    assert [text for text in figure.axes[0].get_title().split("Task: ") if text] == [task.replace("$", r"\$")]


# -- pictures and links -----------------------------------------------------------------------------------------------


def test_only_regular_files_of_the_folder_are_pictures(folder: Path, tmp_path: Path, drawn_quickly: None) -> None:
    figures = folder / "figures"
    figures.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (figures / "own.png").write_bytes(b"own")
    (figures / "inner.png").symlink_to(figures / "own.png")
    (figures / "out.png").symlink_to(tmp_path / "secret.png")
    (figures / "folder.png").mkdir()
    os.mkfifo(figures / "pipe.png")
    (folder / "seed-0" / "figures").mkdir()
    os.mkfifo(folder / "seed-0" / "figures" / "episodes.gif")
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,b3du") == 2  # own and inner
    assert "c2VjcmV0" not in page
    for name in ("out.png", "folder.png", "pipe.png", "episodes.gif"):
        assert f"<p>{name} is no regular file of this folder" in page


@pytest.mark.parametrize("link", ["seed-0", "study", "figures", "seed-0/analyses"])
def test_a_report_reads_nothing_outside(link: str, folder: Path, tmp_path: Path, drawn_quickly: None) -> None:
    (folder / "figures").mkdir()
    shutil.move(folder / link, tmp_path / "outside")
    (folder / link).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"leads to .*outside.*, out of"):
        write_report([folder], tmp_path / "report.html")


@pytest.mark.parametrize("link", ["figures", "figures/x.png"])
def test_figures_are_written_nowhere_else(link: str, tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", RunFolder(tmp_path / "run")
    outside.mkdir()
    (outside / "x.png").write_text("mine")
    (run.path / link).parent.mkdir(parents=True)
    (run.path / link).symlink_to(outside / "x.png" if link.endswith("png") else outside)
    with pytest.raises(UserError, match="leads to"):
        save_figure(Figure(), run, "x")
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]
