"""The report: self-contained, complete, honest about what was not measured; and in a browser, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import quick_reproductions
from metacontroller.cli import main
from metacontroller.report.html import write_report
from metacontroller.storage.run_folder import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def reproduction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "tiny <run>"
    words = ["--preset", "debug", "--out", str(out), "--seeds", "0", "1", "--quiet", "--device", "cpu"]
    with quick_reproductions():
        assert main(["reproduce", *words]) == 0
    return out


def data_of(page: str) -> list:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_the_report_is_one_file_that_loads_nothing(reproduction: Path, tmp_path: Path) -> None:
    page = write_report([reproduction], tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert "@import" not in page
    assert "CONTENT-->" not in page
    assert "DATA-->" not in page
    assert page.count("<figure><svg") == 8 + 3  # figures and the player's panels
    assert "no pictures</p>" in page
    assert "tiny &lt;run&gt;: 2 seeds" in page
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_what_was_not_measured_is_said(reproduction: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = write_report([reproduction], tmp_path / "before.html").read_text()
    assert before.count("<td>not measured</td>") == 5 + 4  # analyses and baselines
    assert all(episode["belief"] is None for episode in data_of(before)[0]["episodes"])
    quick = ["--steps", "3", "--batch-size", "8", "--episodes", "16", "--quiet", "--device", "cpu"]
    assert main(["probe", str(reproduction), *quick]) == 0
    assert main(["steer", str(reproduction), *quick]) == 0
    assert main(["inject", str(reproduction), "--walks", "8", "--device", "cpu"]) == 0
    assert main(["episodes", str(reproduction), "--device", "cpu"]) == 0  # now with the probes' belief
    assert main(["report", str(reproduction), "--out", str(tmp_path / "after.html")]) == 0
    after = (tmp_path / "after.html").read_text()
    assert after.count("<td>not measured</td>") == 4
    for episode in data_of(after)[0]["episodes"]:
        assert all(sum(belief) == pytest.approx(1, abs=1e-3) for belief in episode["belief"])


def test_the_player_shows_the_episodes_of_the_first_seed(reproduction: Path, tmp_path: Path) -> None:
    (player,) = data_of(write_report([reproduction], tmp_path / "report.html").read_text())
    assert player == RunFolder(reproduction / "seed-0").read_analysis("episodes")


def test_without_episodes_there_is_no_player(reproduction: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(reproduction, tmp_path / "copy")
    (copy / "seed-0" / "analyses" / "episodes.json").unlink()
    page = write_report([copy], tmp_path / "report.html").read_text()
    assert data_of(page) == []
    assert "<p>not measured</p>" in page
    assert 'player-root" aria' not in page


def test_figures_of_other_packages_are_shown_as_they_are(reproduction: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(reproduction, tmp_path / "copy")
    (copy / "figures").mkdir(exist_ok=True)
    (copy / "figures" / "my_own.png").write_bytes(b"a picture")
    page = write_report([copy], tmp_path / "report.html").read_text()
    assert page.count('<figure><img src="data:image/png;base64,') == 1
    assert "<figcaption>my_own</figcaption>" in page


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished reproduction; run `metacontroller reproduce --out"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_player_steps_forth_and_back_in_a_browser(reproduction: Path, tmp_path: Path) -> None:
    page = write_report([reproduction], tmp_path / "report.html").read_text()
    # the page presses its own buttons, and says what it then shows, and every error
    script = """<script>
const said = [], part = name => document.querySelector("[data-part=" + name + "]"), now = () => part("now").textContent;
said.push(now()); part("forth").click(); part("forth").click();
said.push(now()); part("back").click(); said.push(now());
said.push(part("picture").src.startsWith("data:image/png") + " picture");
document.title = "SAID " + said.join(" | ") + " ERRORS " + window.failures.length;
</script></body>"""
    catch = (
        "<script>window.failures = []; window.onerror = message => { window.failures.push(message); };</script></head>"
    )
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("</head>", catch).replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *options, profile, "--dump-dom", driven.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r"<title>SAID (.*?) ERRORS (\d+)</title>", done.stdout)
    assert found is not None, done.stderr
    steps = [int(number) for number in re.findall(r"step (\d+) of", found.group(1))]
    assert steps == [0, 2, 1]
    assert "true picture" in found.group(1)
    assert found.group(2) == "0"
