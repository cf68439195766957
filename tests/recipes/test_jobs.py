"""Jobs in processes of their own: each failure reaches the caller as it was, and the others run all the same."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metacontroller.errors import DivergedError, UserError
from metacontroller.recipes.jobs import Job, _packed, _unpacked, failure_read, failure_written, run_jobs, write_failure

LONG = "x" * 1_000_000
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="a job that hangs is ended by an alarm")


class TwoWordsError(Exception):
    """As many libraries' errors: made of two values, it cannot be made again of its text."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__(f"{name} is not in {place}")


class DivergedThereError(DivergedError):
    """A user's mistake with a status, likewise."""

    def __init__(self, name: str, place: str) -> None:
        super().__init__(f"{name} diverged in {place}")


class HoldingError(Exception):
    """It cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def fail(kind: str) -> None:
    """A job that ends as it is told to."""
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "left":
        os._exit(3)
    errors = {
        "long": HoldingError(LONG),
        "held": HoldingError("held"),
        "user": UserError("x is 3; expected 2."),
        "two words": TwoWordsError("key", "table"),
        "diverged": DivergedThereError("loss", "discover"),
        "plain": KeyError("x"),
    }
    if kind in errors:
        raise errors[kind]


def one_after_another(jobs: list[Job]) -> Any:
    """A function that gives one job after the other, and None when there is none left."""
    return lambda: jobs.pop(0) if jobs else None


@pytest.fixture
def _quick() -> Iterator[None]:
    """A parent that waits for ever fails after two minutes."""

    def late(*_: object) -> None:
        raise TimeoutError("the jobs do not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_every_failure_is_returned_as_it_was_and_the_rest_run(capfd: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    jobs: list[Job] = [("long",), ("two words",), ("killed",), ("left",), ("well",)]
    failed = run_jobs(fail, one_after_another(jobs), lambda: done.append(1), workers=5)
    said = {job[0]: error for job, error in failed}
    assert len(done) == 5
    assert set(said) == {"long", "two words", "killed", "left"}
    assert str(said["long"]).endswith(f"HoldingError: {LONG}")
    assert str(said["two words"]).endswith("TwoWordsError: key is not in table")
    assert str(said["killed"]).startswith("a process was killed by SIGKILL, perhaps because memory ran out")
    assert str(said["left"]) == "a process ended with status 3 before its work was done; resume with --resume."
    assert isinstance(said["killed"], UserError)
    assert capfd.readouterr().err.count("in fail\n") == 2  # tracebacks are shown where they were made


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", KeyError("x")),
        ("user", UserError("x is 3; expected 2.")),
        ("two words", RuntimeError(f"{__name__}.TwoWordsError: key is not in table")),
        ("diverged", UserError("loss diverged in discover")),
        ("held", RuntimeError(f"{__name__}.HoldingError: held")),
    ],
)
def test_an_error_travels_as_itself_or_as_its_text(kind: str, expected: Exception) -> None:
    """The user's mistakes remain such, with their exit status."""
    error = raised(fail, kind)
    assert error is not None
    travelled = _unpacked(*_packed(error))
    assert repr(travelled) == repr(expected)
    assert getattr(travelled, "status", None) == getattr(error, "status", None)


def test_in_this_process_the_rest_run_too() -> None:
    jobs: list[Job] = [("plain",), ("well",)]
    done: list[int] = []
    failed = run_jobs(fail, one_after_another(jobs), lambda: done.append(1))
    assert [(job, str(error)) for job, error in failed] == [(("plain",), "'x'")]
    assert len(done) == 2


def test_a_failure_is_written_and_forgotten_when_the_job_ends_well(tmp_path: Path) -> None:
    with failure_written(tmp_path / "job"):
        fail("two words")
    text = (tmp_path / "job" / "error.txt").read_text()
    assert text.endswith("TwoWordsError: key is not in table\n")
    assert "Traceback" in text
    with failure_written(tmp_path / "job"):
        pass
    assert list((tmp_path / "job").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no \udc80.npy"), r"OSError: no \udc80.npy"),
        (ValueError(LONG), f"ValueError: {LONG}"[:500]),
        (ValueError(), "ValueError"),
    ],
    ids=["a name that is no text", "long", "without words"],
)
def test_any_error_can_be_written_and_read(tmp_path: Path, error: Exception, line: str) -> None:
    write_failure(tmp_path, error)
    assert failure_read(tmp_path) == line


# -- clusters ---------------------------------------------------------------------------------------------------------


class Submitit:
    """Stands for submitit: runs jobs at once, in this process, and keeps what was asked for."""

    def __init__(self, **options: Any) -> None:
        self.asked: dict[str, Any] = {}

    def AutoExecutor(self, **options: Any) -> Submitit:
        return self

    def update_parameters(self, **options: Any) -> None:
        self.asked |= options

    def batch(self) -> Any:
        return threading.Lock()  # some context

    def submit(self, function: Any, *job: Any) -> Any:
        return SimpleNamespace(exception=lambda: raised(function, *job))


class Ray:
    """Stands for Ray, likewise."""

    def init(self, **options: Any) -> None:
        pass

    def remote(self, **options: Any) -> Any:
        self.asked = options
        return lambda function: SimpleNamespace(remote=lambda *job: (function, *job))

    def wait(self, running: list[Any]) -> tuple[list[Any], list[Any]]:
        return running[:1], running[1:]

    def get(self, one: Any) -> None:
        one[0](*one[1:])


def raised(function: Any, *job: Any) -> Exception | None:
    try:
        function(*job)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(
    ("engine", "package", "option"), [("slurm", Submitit, "gpus_per_node"), ("ray", Ray, "num_gpus")]
)
@pytest.mark.parametrize(("device", "gpus"), [("cuda", 1), ("cpu", 0)])
def test_a_cluster_is_asked_for_a_gpu_where_jobs_use_one(
    engine: Any, package: Any, option: str, device: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = package()
    monkeypatch.setitem(sys.modules, "submitit" if engine == "slurm" else "ray", stand_in)
    jobs: list[Job] = [("well",), ("plain",)]
    failed = run_jobs(fail, one_after_another(jobs), lambda: None, engine=engine, device=device)
    assert stand_in.asked.get(option, 0) == gpus
    assert [(job, repr(error)) for job, error in failed] == [(("plain",), "KeyError('x')")]
