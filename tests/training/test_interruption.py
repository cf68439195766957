"""SIGTERM and SIGINT: the update is finished, the checkpoint written, one line says how to go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from metacontroller import cli
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training import interruption
from metacontroller.training.interruption import Interrupted, finishing, listening, requested

DEBUG = ["--preset", "debug", "--quiet", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """SIGINT as in a terminal; a shell's background job starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled_work(number: int, *, dies: bool = False) -> None:
    """Work that a signal falls into; dies: as where a worker process has died of the signal."""
    os.kill(os.getpid(), number)
    if dies:
        raise EOFError
    time.sleep(2)


def test_a_signal_waits_for_the_update_and_elsewhere_does_not() -> None:
    with listening(lambda number: None):
        with finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # a second one changes nothing
            assert requested()
        with pytest.raises(Interrupted) as caught:
            interruption.stop()
        assert caught.value.status == 143
    with listening(lambda number: None):
        with pytest.raises(Interrupted) as caught:
            signalled_work(signal.SIGINT)
        assert caught.value.status == 130
    assert not requested()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_update_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "GRACE_S", 0.05)
    with listening(lambda number: None), pytest.raises(Interrupted), finishing():
        signalled_work(signal.SIGTERM)


def test_an_error_after_a_signal_is_an_interruption() -> None:
    with listening(lambda number: None):
        with pytest.raises(EOFError), finishing():
            raise EOFError
        with pytest.raises(Interrupted), finishing():
            signalled_work(signal.SIGTERM, dies=True)


SIZES = ["--config.pretrain.optimizer.checkpoint-every", "8", "--config.discover.optimizer.checkpoint-every", "8"]
COMMANDS = {
    "pretrain": ["pretrain", "{run}", *DEBUG, *SIZES],
    "discover": ["discover", "{run}", *DEBUG[2:]],
    "internal_rl": ["internal-rl", "{run}", *DEBUG[2:]],
    "raw_action_rl": ["internal-rl", "{run}", "--raw", *DEBUG[2:]],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through all phases, and beside it, by the name of a phase, what it was before that phase."""
    folder = tmp_path_factory.mktemp("interruption")
    for phase, words in COMMANDS.items():
        if (folder / "whole").exists():
            shutil.copytree(folder / "whole", folder / phase)
        assert cli.main([word.format(run=folder / "whole") for word in words]) == 0
    return folder


@pytest.mark.parametrize("phase", COMMANDS)
def test_an_interrupted_phase_leaves_a_checkpoint_and_resumes_as_if_it_had_not_stopped(
    phase: str, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [word.format(run=whole / phase) for word in COMMANDS[phase]]
    with monkeypatch.context() as patch:
        calls = iter(range(1, 99))

        def signalled() -> bool:
            if next(calls) == 2:  # after update 2, where neither a line of metrics nor a checkpoint is due
                os.kill(os.getpid(), signal.SIGTERM)
            return requested()

        patch.setattr("metacontroller.training.repeat.requested", signalled)
        assert cli.main(command) == 143
    told = capsys.readouterr().err
    assert told == f"metacontroller: stopped by SIGTERM; go on with: metacontroller {' '.join(command)} --resume\n"
    run = RunFolder(whole / phase)
    assert run.load_checkpoint(phase)[1]["step"] == 2
    assert cli.main([*command, "--resume"]) == 0
    assert run.read_metrics(phase) == RunFolder(whole / "whole").read_metrics(phase)
    for path in run.path.glob("*.safetensors"):
        expected, again = load_file(whole / "whole" / path.name), load_file(path)
        assert expected.keys() == again.keys()
        assert all(equal(value, again[name]) for name, value in expected.items())


def sleep_long(path: Path) -> None:
    """A job that notes whether an interrupt can reach it, and that it was told to stop."""
    path.with_suffix(".begun").write_text(str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    try:
        time.sleep(60)
    except Interrupted as interrupted:
        path.write_text(str(interrupted.number))
        raise


def test_worker_processes_are_told_by_their_parent_alone(tmp_path: Path) -> None:
    script = f"""
import os, signal, threading, time
from pathlib import Path
from metacontroller.recipes.jobs import in_processes
from metacontroller.training.interruption import Interrupted, listening
from test_interruption import sleep_long

if __name__ == "__main__":
    paths = [Path({str(tmp_path)!r}) / name for name in "ab"]
    def kill():
        while not all(path.with_suffix(".begun").exists() for path in paths):
            time.sleep(0.05)
        os.killpg(0, signal.SIGINT)
    threading.Thread(target=kill, daemon=True).start()
    with listening(lambda number: None):
        try:
            in_processes(sleep_long, [(path,) for path in paths], at_once=2)
        except Interrupted as interrupted:
            raise SystemExit(interrupted.status)
"""
    (tmp_path / "script.py").write_text(script)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert (done.returncode, done.stderr) == (130, "")
    assert [(tmp_path / name).read_text() for name in "ab"] == [str(int(signal.SIGTERM))] * 2
    assert [(tmp_path / f"{name}.begun").read_text() for name in "ab"] == ["True"] * 2


def test_while_it_starts_a_command_ends_at_once(tmp_path: Path) -> None:
    script = f"""
import os, signal
from metacontroller import cli
cli.parse = lambda words: os.kill(os.getpid(), signal.SIGINT)
cli.main(['pretrain', {str(tmp_path / "run")!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    line = f"metacontroller: stopped by SIGINT; go on with: metacontroller pretrain {tmp_path / 'run'} --resume\n"
    assert (done.returncode, done.stderr) == (130, line)
