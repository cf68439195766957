"""The script `torture` itself can fail: what accepts everything, hangs, or runs code is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from metacontroller.errors import UserError

SCRIPTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in ("damage", "damage_kinds", "damage_readers", "torture_runs", "torture_faults", "torture_meetings"):
        sys.modules.pop(name, None)


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound folder of one JSON file, and a copy to damage."""
    for name in ("sound", "damaged"):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        (folder / "a.json").write_text(json.dumps({"steps": 3, "name": "sound", "rates": [0.5, 0.25]}))
    monkeypatch.setenv("METACONTROLLER_CANARY", str(tmp_path / "canary"))
    return tmp_path


def _checked(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes()))
    except (ValueError, OSError, RecursionError):
        raise UserError(f"{path} is damaged.") from None


def _says(path: Path) -> str:
    print("read unchecked", file=sys.stderr)
    return path.read_bytes().hex() if path.is_file() else ""


def _runs_code(path: Path) -> str:
    (path.parents[2] / "canary").mkdir()
    return ""


def _obscure(path: Path) -> str:
    raise UserError("something is damaged.")


def _grasps(path: Path) -> str:
    raise MemoryError


def script(name: str) -> Any:
    """A module of the folder benchmarks."""
    return import_module(name)


def _outcomes(work: Path, read: Callable[[Path], str], trials: int = 12, **facts: Any) -> set[str]:
    """What damaged files come to with a reader; never by a pipe or an endless file, which these would read."""
    damage, damage_kinds = script("damage"), script("damage_kinds")
    damage_kinds.ANY = [damage_kinds.cut, damage_kinds.noise, damage_kinds.a_pickle]
    damage_kinds.BY_SUFFIX = {".json": [damage_kinds.near_value]}
    reader = damage.Reader("run/a.json", lambda folder: read(folder / "run" / "a.json"), **facts)
    sound = read(work / "sound" / "run" / "a.json") if read in (_checked, _says) else "sound"
    found = [damage.attempt(n, 0, work, {"a": reader}, {"a": sound}).outcome for n in range(trials)]
    assert (work / "damaged" / "run" / "a.json").read_bytes() == (work / "sound" / "run" / "a.json").read_bytes()
    return set(found)


def test_what_readers_do_with_damage_is_told(work: Path) -> None:
    assert _outcomes(work, lambda path: "anything") == {"in silence"}
    assert _outcomes(work, lambda path: "sound") == {"equal in meaning"}
    assert _outcomes(work, lambda path: str({}[path])) == {"traceback"}
    assert _outcomes(work, _obscure) == {"obscure"}
    assert _outcomes(work, _runs_code) == {"code run"}
    assert _outcomes(work, _grasps) == {"memory"}
    assert _outcomes(work, _checked) == {"named error", "in silence"}  # JSON alone does not tell a changed number
    assert _outcomes(work, _says, unchecked="old", says=True) == {"said unchecked"}
    assert _outcomes(work, lambda path: "anything", unchecked="old", says=True) == {"in silence"}


def test_a_process_that_hangs_or_dies_is_told_and_the_rest_goes_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage = script("damage")

    class Stuck:
        """A process that begins its first trial, and either waits for ever or ends there."""

        exitcode = -11

        def __init__(self, sender: Any, trials: list[int]) -> None:
            self.sender = sender.__class__(os.dup(sender.fileno()))
            sender.send(trials[0])
            if trials[0] == 8:
                self.kill()

        def join(self, timeout: float | None = None) -> None:
            pass

        def kill(self) -> None:
            self.sender.close()

    monkeypatch.setattr(damage, "HANG_S", 0.05)
    findings = damage.Findings()
    process = damage.Process(work, 0, [7, 8], lambda sender, work, seed, trials: Stuck(sender, trials or [9]))
    while process.left:
        process.ask(findings, {"a": damage.Reader("run/a.json", str)})
    assert [(one.trial, one.outcome) for one in findings.failures] == [(7, "hang"), (8, "traceback")]
    process.stop()
    assert "FAILED trial 7" in capsys.readouterr().out
    assert damage.table(findings)[-1].startswith("| all | 0 | 0 | 0 | 0 | 0 | 1 | 1 |")


# -- runs -------------------------------------------------------------------------------------------------------------

FAREWELL = "metacontroller: stopped by SIGTERM; go on with: metacontroller discover 'a b' --resume\n"


def test_how_a_command_ends_is_judged() -> None:
    module = script("torture_runs")
    ending = module.ending

    term = signal.SIGTERM
    failure, onwards = ending(term, 143, FAREWELL, 1.0)
    assert failure is None
    assert onwards is not None
    assert onwards[-3:] == ["discover", "a b", "--resume"]
    assert ending(signal.SIGKILL, -9, "", 0.0) == ending(term, 0, "", 0.0) == (None, None)
    assert "took 5.1 s" in str(ending(term, 143, FAREWELL, 5.1))
    assert "0 lines that name" in str(ending(term, 143, "", 1.0))
    assert "status 143 and 2 lines" in str(ending(term, 143, 2 * FAREWELL, 1.0))
    assert "status 143" in str(ending(term, 143, f"Traceback\n{FAREWELL}", 1.0))
    assert "status 130" in str(ending(term, 130, FAREWELL, 1.0))
    assert "status -15" in str(ending(term, -15, "half a line", 1.0))


def test_one_other_bit_of_what_is_left_is_seen(tmp_path: Path) -> None:
    module = script("torture_runs")
    differs, left_behind = module.differs, module.left_behind

    (tmp_path / "summary.json").write_text('{"success": 0.5, "seconds": 3}')
    (tmp_path / "metrics.jsonl").write_text('{"phase": "p", "step": 1, "loss": 0.5}\n')
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    expected = left_behind(tmp_path)
    (tmp_path / "summary.json").write_text('{"success": 0.5, "seconds": 4}')
    assert differs(tmp_path, expected) is None
    save_file({"w": torch.ones(3).nextafter(torch.tensor(2.0))}, tmp_path / "a.safetensors")
    assert differs(tmp_path, expected) == "a.safetensors differs"
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "metrics.jsonl").write_text('{"phase": "p", "step": 1, "loss": 0.25}\n')
    assert differs(tmp_path, expected) == "metrics.jsonl differs"
    (tmp_path / "metrics.jsonl").unlink()
    assert differs(tmp_path, expected) == "holds other files: ['metrics.jsonl']"


def test_every_command_meets_kills_and_signals() -> None:
    module = script("torture_runs")
    COMMANDS, schedule = module.COMMANDS, module.schedule

    trials = schedule(100, 40, list(COMMANDS), 0)
    assert len(trials) == 140
    for kinds in ({signal.SIGKILL}, {signal.SIGTERM, signal.SIGINT}):
        assert {name for name, by in trials if by in kinds} == set(COMMANDS)
    assert trials == schedule(100, 40, list(COMMANDS), 0) != schedule(100, 40, list(COMMANDS), 1)


def test_a_refusal_is_one_line_and_its_status() -> None:
    module = script("torture_faults")
    stands = module.stands

    def done(status: int, said: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], status, "", said)

    assert stands(done(4, "no space is left for a.\n"), 4, "no space") is None
    for status, said in ((1, "no space"), (4, "no space\nagain"), (4, "full"), (4, "")):
        assert stands(done(status, said), 4, "no space") is not None
