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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from metacontroller.errors import UserError, import_extra
from metacontroller.storage.files import read_regular
from metacontroller.storage.manifest import write_text
from metacontroller.training.interruption import Interrupted, listening

Engine = Literal["processes", "slurm", "ray"]
Job = tuple[Any, ...]
"""The arguments of one call."""
Failure = tuple[Job, BaseException]
"""A job and what it raised, or how its process ended."""
NextJob = Callable[[], "Job | None"]
"""Gives a job that can be started now, or None; it is asked again when one ends."""
Outcomes = Generator[tuple[Job, "BaseException | None"], None, None]
"""Each job when it has ended, with its error if it failed; closing it ends those that run."""
MAX_ERROR, MAX_ERROR_BYTES = 2**20, 2**24
"""Characters of an error that are written, and bytes that are read: none of them has more than six."""
MAX_LINE = 500
"""Characters of an error that a table shows."""
FAREWELL_S = 4.0
"""Seconds that a job has, once it is told to stop, for its update and its checkpoint."""


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
    gpus = int(device.startswith("cuda"))
    if engine == "slurm":
        outcomes = _on_slurm(function, next_job, workers, address, minutes, logs, gpus)
    elif engine == "ray":
        outcomes = _on_ray(function, next_job, address, gpus)
    elif workers > 1:
        outcomes = _in_processes(function, next_job, workers, threads=1)
    else:
        outcomes = ((job, _error_of(function, job)) for job in iter(next_job, None))
    failed: list[Failure] = []
    with closing(outcomes):
        for job, error in outcomes:
            if error is not None:
                failed.append((job, error))
            advance()
    return failed


def in_processes(function: Callable[..., Any], jobs: Sequence[Job], *, at_once: int = 1, threads: int = 1) -> None:
    """Calls ``function(*job)`` for every job, each in a process of its own with so many threads.

    What one raises is raised here, and UserError if one is killed; the others are ended, as when this process is
    interrupted: each phase can be resumed.
    """
    left = iter(jobs)
    with closing(_in_processes(function, lambda: next(left, None), at_once, threads)) as outcomes:
        for _, error in outcomes:
            if error is not None:
                raise error


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


def _in_processes(function: Callable[..., Any], next_job: NextJob, at_once: int, threads: int) -> Outcomes:
    running: dict[Any, tuple[BaseProcess, Job]] = {}  # by the connection through which it tells its outcome
    try:
        while True:
            while len(running) < at_once and (job := next_job()) is not None:
                _start(function, job, threads, running)
            if not running:
                return
            for receiver in wait(list(running)):
                process, job = running.pop(receiver)
                yield job, _outcome(process, receiver)
    finally:
        for process, _ in running.values():
            process.terminate()
        deadline = time.monotonic() + FAREWELL_S
        for process, _ in running.values():
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()  # it is only resumed from an older checkpoint
            process.join()


def _start(function: Callable[..., Any], job: Job, threads: int, running: dict[Any, tuple[BaseProcess, Job]]) -> None:
    """Starts a process with SIGINT blocked: an interrupt, which reaches this process too, would meet it before `_call`
    and be shown as a traceback."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, job, threads, sender))
    mask = getattr(signal, "pthread_sigmask", lambda how, signals: signals)
    resource_tracker.ensure_running()  # which starts with the first process, and would unblock SIGINT
    before = mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
        running[receiver] = process, job
    finally:
        mask(signal.SIG_SETMASK, before)
    sender.close()


def _outcome(process: BaseProcess, receiver: Any) -> Exception | None:
    """What a job raised. Asked as soon as there is word of it: the pipe holds little, and its sender waits."""
    message = None
    with receiver, suppress(EOFError, OSError):  # its process ended before it could tell, or amid that
        message = receiver.recv()
    process.join()
    if message is None:
        return _early_end(process.exitcode or 0)
    return _unpacked(*message) if message else None


def _call(function: Callable[..., Any], job: Job, threads: int, sender: Connection) -> None:
    """In a new process: calls the function and tells whether it raised something.

    An interrupt reaches the parent too, which tells its workers to stop by SIGTERM.
    """
    start_worker(threads)
    with listening(lambda number: None, ignored=(signal.SIGINT,)):
        try:
            error = _error_of(function, job)
            sender.send(() if error is None else _packed(error))
            if error is not None and not isinstance(error, UserError):
                raise error  # so that the traceback, which does not travel, is shown here
        except Interrupted as interrupted:
            sys.exit(interrupted.status)


def start_worker(threads: int) -> None:
    """Prepares a worker process: so many threads, and an end when its parent ends: it would otherwise train on, beside
    the run that resumes its folder."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _error_of(function: Callable[..., Any], job: Job) -> Exception | None:
    try:
        function(*job)
    except Exception as error:
        return error
    return None


def _packed(error: Exception) -> tuple[str, int | None, bytes]:
    """What travels of an error: its text, its status if it is the user's mistake, and itself if it can be pickled."""
    pickled = b""
    with suppress(Exception):  # of user's classes and what they hold, anything
        pickled = pickle.dumps(error)
    if isinstance(error, UserError):
        return str(error), error.status, pickled
    return "".join(traceback.format_exception_only(error)).strip(), None, pickled


def _unpacked(text: str, status: int | None, pickled: bytes) -> Exception:
    """The error, or its text where its class makes another one of it: many cannot be made again of it alone."""
    with suppress(Exception):
        error = pickle.loads(pickled)  # noqa: S301 (by a process of ours, as all that comes through its pipe)
        if _packed(error)[:2] == (text, status):
            return error
    if status is None:
        return RuntimeError(text)
    error = UserError(text)
    error.status = status
    return error


def _early_end(status: int) -> UserError:
    """The error of a process that ended, with this status, before it could tell of its job."""
    number = -status if status < 0 else status - 128  # Interrupted
    if number == getattr(signal, "SIGKILL", None):
        return UserError(
            "a process was killed by SIGKILL, perhaps because memory ran out; resume with --resume, with fewer "
            "--workers or smaller batches if it happens again."
        )
    known = number in set(signal.Signals)
    how = f"was ended by {signal.Signals(number).name}" if known else f"ended with status {status}"
    return UserError(f"a process {how} before its work was done; resume with --resume.")


# -- clusters ---------------------------------------------------------------------------------------------------------


def _on_slurm(
    function: Callable[..., Any],
    next_job: NextJob,
    workers: int,
    address: str | None,
    minutes: int,
    logs: Path | None,
    gpus: int,
) -> Outcomes:
    submitit = import_extra("submitit", "cluster")
    executor = submitit.AutoExecutor(folder=logs or Path("slurm"), cluster=address)
    gpu = {"gpus_per_node": gpus} if gpus else {}  # a cluster without any refuses to be asked for 0
    executor.update_parameters(timeout_min=minutes, cpus_per_task=1, slurm_array_parallelism=workers, **gpu)
    while jobs := list(iter(next_job, None)):  # an array of all that can be started now
        with executor.batch():
            submitted = [executor.submit(_Requeued(function), *job) for job in jobs]
        for job, running in zip(jobs, submitted, strict=True):
            yield job, running.exception()  # waits


@dataclass(frozen=True)
class _Requeued:
    """A function that submitit queues again, with the same arguments, when Slurm preempts its job or its time is up."""

    function: Callable[..., Any]

    def __call__(self, *job: Any) -> None:
        self.function(*job)

    def checkpoint(self, *job: Any) -> Any:
        """Called by submitit in the job, before it ends."""
        return import_extra("submitit", "cluster").helpers.DelayedSubmission(self, *job)


def _on_ray(function: Callable[..., Any], next_job: NextJob, address: str | None, gpus: int) -> Outcomes:
    ray = import_extra("ray", "cluster")
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(function)
    running: dict[Any, Job] = {}
    while True:
        running |= {remote.remote(*job): job for job in iter(next_job, None)}
        if not running:
            return
        for one in ray.wait(list(running))[0]:
            yield running.pop(one), _error_of(ray.get, (one,))
