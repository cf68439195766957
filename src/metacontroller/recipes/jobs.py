"""Many calls of one function, each in a process of its own: here, by submitit on Slurm, or on a Ray cluster.

A process that is killed takes no other with it, and all memory that a call took is given back when it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

import torch

from metacontroller.errors import UserError
from metacontroller.storage.files import read_regular, write_text
from metacontroller.training.interruption import Interrupted, listening, signal_name

Engine = Literal["processes", "slurm", "ray"]
Job = tuple[Any, ...]
"""The arguments of one call."""
Failure = tuple[Job, BaseException]
"""A job and what it raised, or how its process ended."""
MAX_ERROR, MAX_ERROR_BYTES = 2**20, 2**24
"""Characters of an error that are written, and bytes that are read: none of them has more than six."""
MAX_LINE = 500
"""Characters of an error that a table shows."""
FAREWELL_S = 4.0
"""Seconds that a job has, once it is told to stop, for its update and its checkpoint."""
NextJob = Callable[[], "Job | None"]
"""Gives a job that can be started now, or None; it is asked again when one ends."""


def run_jobs(
    function: Callable[..., Any],
    next_job: NextJob,
    advance: Callable[[], None],
    *,
    engine: Engine = "processes",
    workers: int = 1,
    address: str | None = None,
    minutes: int = 24 * 60,
    logs: Path | None = None,
    device: str = "cpu",
) -> list[Failure]:
    """Calls ``function(*job)`` for each of the jobs that ``next_job`` gives, and ``advance`` after each; returns those
    that failed. The others run all the same.

    engine "processes": ``workers`` at the same time, one thread each; with one worker in this process. "slurm": by
    submitit, ``workers`` at the same time for ``minutes`` at most, its logs in the folder ``logs``; address "local"
    tries it out on this machine. "ray": on the cluster at ``address``, or on this machine; it decides how many. Both
    are asked for a GPU for each job where ``device`` is "cuda".
    """
    failed: list[Failure] = []

    def ended(job: Job, error: BaseException | None) -> None:
        if error is not None:
            failed.append((job, error))
        advance()

    gpus = int(device.startswith("cuda"))
    if engine == "slurm":
        _on_slurm(function, next_job, ended, workers, address, minutes, logs, gpus)
    elif engine == "ray":
        _on_ray(function, next_job, ended, address, gpus)
    elif workers > 1:
        _in_processes(function, next_job, ended, workers, threads=1)
    else:
        while (job := next_job()) is not None:
            ended(job, _error_of(function, job))
    return failed


def in_processes(function: Callable[..., Any], jobs: Sequence[Job], *, at_once: int = 1, threads: int = 1) -> None:
    """Calls ``function(*job)`` for every job, each in a process of its own with so many threads.

    What one raises is raised here, and UserError if one is killed; the others are ended, as when this process is
    interrupted: each phase can be resumed.
    """
    left = list(jobs)

    def ended(job: Job, error: BaseException | None) -> None:
        if error is not None:
            raise error

    _in_processes(function, lambda: left.pop(0) if left else None, ended, at_once, threads=threads)


def write_failure(folder: Path, error: BaseException) -> None:
    """Writes what ended a job to ``error.txt`` in its folder, its end where that is long."""
    text = "".join(traceback.format_exception(error))[-MAX_ERROR:]
    write_text(folder / "error.txt", text.encode(errors="backslashreplace").decode())


def failure_read(folder: Path) -> str | None:
    """The last line of a job's ``error.txt``, its beginning where that is long; None if there is none."""
    text = read_regular(folder, folder / "error.txt", MAX_ERROR_BYTES)
    return None if text is None else (text.decode(errors="replace").strip().splitlines() or [""])[-1][:MAX_LINE]


@contextmanager
def failure_written(folder: Path) -> Iterator[None]:
    """Context of a job: an exception ends there, in ``error.txt`` of its folder, which is removed when it ends well."""
    try:
        yield
    except Exception as error:
        write_failure(folder, error)
    else:
        (folder / "error.txt").unlink(missing_ok=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- processes --------------------------------------------------------------------------------------------------------


Ended = Callable[[Job, "BaseException | None"], None]
"""Told of every job that has ended, with its error if it failed; what it raises ends all others."""


@dataclass(frozen=True)
class _Worker:
    """A process, its job, and where it tells how that ended."""

    process: SpawnProcess
    job: Job
    receiver: Connection

    def has_ended(self) -> bool:
        return self.receiver.poll() or not self.process.is_alive()

    def error(self) -> BaseException | None:
        """What the job raised. Asked as soon as there is word of it: the pipe holds little, and its sender waits."""
        told = ()
        with suppress(EOFError, OSError):  # it ended without a word, or amid one
            told = self.receiver.recv() if self.receiver.poll() else ()
        self.process.join()
        self.receiver.close()
        if told is None:
            return None
        return _rebuilt(*told) if told else _early_end(self.process.exitcode or 0)


def _in_processes(function: Callable[..., Any], next_job: NextJob, ended: Ended, at_once: int, *, threads: int) -> None:
    running: list[_Worker] = []
    try:
        while True:
            while len(running) < at_once and (job := next_job()) is not None:
                _start(function, job, threads, running)
            if not running:
                return
            wait([handle for worker in running for handle in (worker.receiver, worker.process.sentinel)])
            for worker in [worker for worker in running if worker.has_ended()]:
                error = worker.error()
                running.remove(worker)
                ended(worker.job, error)
    except BaseException:
        for worker in running:
            worker.process.terminate()
        deadline = time.monotonic() + FAREWELL_S
        for worker in running:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()  # it is only resumed from an older checkpoint
            worker.process.join()
        raise


def _start(function: Callable[..., Any], job: Job, threads: int, running: list[_Worker]) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, job, threads, sender))
    with _interrupts_held_back():
        process.start()
        running.append(_Worker(process, job, receiver))
    sender.close()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """What starts here is born with SIGINT blocked: an interrupt, which reaches this process too, would meet it before
    `_call` and be shown as a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which starts with the first process, and would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(function: Callable[..., Any], job: Job, threads: int, sender: Connection) -> None:
    """In a new process: calls the function and tells whether it raised something.

    An interrupt reaches the parent too, which tells its workers to stop by SIGTERM.
    """
    start_worker(threads)
    with listening(lambda number: None, ignored=(signal.SIGINT,)):
        try:
            error = _error_of(function, job)
            sender.send(None if error is None else _told(error))
            if error is not None and not isinstance(error, UserError):
                raise error  # so that the traceback, which does not travel, is shown here
        except Interrupted as interrupted:
            sys.exit(interrupted.status)


def _error_of(function: Callable[..., Any], job: Job) -> Exception | None:
    try:
        function(*job)
    except Exception as error:
        return error
    return None


def _told(error: Exception) -> tuple[str, int | None, bytes]:
    """What travels of an error: its text, its status if it is the user's mistake, and itself if it can be pickled."""
    pickled = b""
    with suppress(Exception):  # of user's classes and what they hold, anything
        pickled = pickle.dumps(error)
    if isinstance(error, UserError):
        return str(error), error.status, pickled
    return "".join(traceback.format_exception_only(error)).strip(), None, pickled


def _rebuilt(text: str, status: int | None, pickled: bytes) -> Exception:
    """The error, or its text where its class makes another one of it: many cannot be made again of it alone."""
    with suppress(Exception):
        error = pickle.loads(pickled)  # noqa: S301 (by a process of ours, as all that comes through its pipe)
        if _told(error)[:2] == (text, status):
            return error
    if status is None:
        return RuntimeError(text)
    known = UserError(text)
    known.status = status
    return known


def _early_end(status: int) -> UserError:
    """The error of a process that ended, with this status, before it could tell of its job."""
    number = -status if status < 0 else status - 128  # Interrupted
    if number == getattr(signal, "SIGKILL", None):
        return UserError(
            "a process was killed by SIGKILL, perhaps because memory ran out; resume with --resume, with fewer "
            "--workers or smaller batches if it happens again."
        )
    how = f"was ended by {signal_name(number)}" if number in set(signal.Signals) else f"ended with status {status}"
    return UserError(f"a process {how} before its work was done; resume with --resume.")


def start_worker(threads: int) -> None:
    """Prepares a worker process: so many threads, and an end when its parent ends."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise train on, beside the run that resumes its folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# -- clusters ---------------------------------------------------------------------------------------------------------


def _on_slurm(
    function: Callable[..., Any],
    next_job: NextJob,
    ended: Ended,
    workers: int,
    address: str | None,
    minutes: int,
    logs: Path | None,
    gpus: int,
) -> None:
    submitit = _need("submitit")
    executor = submitit.AutoExecutor(folder=logs or Path("slurm"), cluster=address)
    gpu = {"gpus_per_node": gpus} if gpus else {}  # a cluster without any refuses to be asked for 0
    executor.update_parameters(timeout_min=minutes, cpus_per_task=1, slurm_array_parallelism=workers, **gpu)
    while jobs := list(iter(next_job, None)):  # an array of all that can be started now
        with executor.batch():
            submitted = [executor.submit(_Requeued(function), *job) for job in jobs]
        for job, running in zip(jobs, submitted, strict=True):
            ended(job, running.exception())  # waits


@dataclass(frozen=True)
class _Requeued:
    """A function that submitit queues again, with the same arguments, when Slurm preempts its job or its time is up."""

    function: Callable[..., Any]

    def __call__(self, *job: Any) -> None:
        self.function(*job)

    def checkpoint(self, *job: Any) -> Any:
        """Called by submitit in the job, before it ends."""
        return _need("submitit").helpers.DelayedSubmission(self, *job)


def _on_ray(function: Callable[..., Any], next_job: NextJob, ended: Ended, address: str | None, gpus: int) -> None:
    ray = _need("ray")
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(function)
    running: dict[Any, Job] = {}
    while True:
        running |= {remote.remote(*job): job for job in iter(next_job, None)}
        if not running:
            return
        for one in ray.wait(list(running))[0]:
            ended(running.pop(one), _error_of(ray.get, (one,)))


def _need(package: str) -> Any:
    """A package of the extra ``cluster``."""
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(
            f"{package} is not installed; install it by: pip install 'metacontroller-rl[cluster]'."
        ) from error
