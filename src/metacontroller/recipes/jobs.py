"""Many calls of one function, each in a process of its own: here, by submitit on Slurm, or on a Ray cluster.

A process that is killed takes no other with it, and all memory that a call took is given back when it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from metacontroller.errors import UserError
from metacontroller.training.interruption import Interrupted, listening

Engine = Literal["processes", "slurm", "ray"]
Job = tuple[Any, ...]
"""The arguments of one call."""
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
) -> None:
    """Calls ``function(*job)`` for each of the jobs that ``next_job`` gives, and ``advance`` after each.

    The function leaves what it has to say in files, failures too: one whose process is killed counts as ended.
    engine "processes": ``workers`` at the same time, one thread each; with one worker in this process. "slurm": by
    submitit, ``workers`` at the same time for ``minutes`` at most, its logs in the folder ``logs``; address "local"
    tries it out on this machine. "ray": on the cluster at ``address``, or on this machine; it decides how many.
    """
    if engine == "slurm":
        _on_slurm(function, next_job, advance, workers, address, minutes, logs)
    elif engine == "ray":
        _on_ray(function, next_job, advance, address)
    elif workers > 1:
        _in_processes(function, next_job, advance, workers, threads=1, strict=False)
    else:
        while (job := next_job()) is not None:
            function(*job)
            advance()


def in_processes(function: Callable[..., Any], jobs: Sequence[Job], *, at_once: int = 1, threads: int = 1) -> None:
    """Calls ``function(*job)`` for every job, each in a process of its own with so many threads.

    What one raises is raised here, and UserError if one is killed; the others are ended, as when this process is
    interrupted: each phase can be resumed.
    """
    left = list(jobs)
    _in_processes(function, lambda: left.pop(0) if left else None, lambda: None, at_once, threads=threads, strict=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- processes --------------------------------------------------------------------------------------------------------


def _in_processes(
    function: Callable[..., Any],
    next_job: NextJob,
    advance: Callable[[], None],
    at_once: int,
    *,
    threads: int,
    strict: bool,
) -> None:
    """strict: whether a process that was killed is an error."""
    context = multiprocessing.get_context("spawn")
    running: dict[BaseProcess, Connection] = {}
    try:
        while True:
            while len(running) < at_once and (job := next_job()) is not None:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_call, args=(function, job, threads, sender))
                with _interrupts_held_back():
                    process.start()
                    running[process] = receiver
                sender.close()
            if not running:
                return
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                error = _error_of(running.pop(process))
                if error is not None and (strict or not isinstance(error, _Killed)):
                    raise error
                advance()
    except BaseException:
        for process in running:
            process.terminate()
        deadline = time.monotonic() + FAREWELL_S
        for process in running:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()  # it is only resumed from an older checkpoint
            process.join()
        raise


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


class _Killed(UserError):
    """A process ended without a word."""


def _call(function: Callable[..., Any], job: Job, threads: int, sender: Connection) -> None:
    """In a new process: calls the function and tells whether it raised something.

    An interrupt reaches the parent too, which tells its workers to stop by SIGTERM.
    """
    start_worker(threads)
    with listening(lambda number: None, ignored=(signal.SIGINT,)):
        try:
            function(*job)
        except Exception as error:
            sender.send(error)
            if not isinstance(error, UserError):
                raise  # so that the traceback, which does not travel, is shown here
        except Interrupted as interrupted:
            sys.exit(interrupted.status)
        else:
            sender.send(None)


def _error_of(receiver: Connection) -> BaseException | None:
    """What a process that has ended raised."""
    try:
        return receiver.recv()
    except EOFError:
        return _Killed(
            "a process ended without a word, perhaps killed because memory ran out; resume with --resume, with fewer "
            "--workers or smaller batches if it happens again."
        )
    finally:
        receiver.close()


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
    advance: Callable[[], None],
    workers: int,
    address: str | None,
    minutes: int,
    logs: Path | None,
) -> None:
    submitit = _need("submitit")
    executor = submitit.AutoExecutor(folder=logs or Path("slurm"), cluster=address)
    executor.update_parameters(timeout_min=minutes, cpus_per_task=1, slurm_array_parallelism=workers)
    while jobs := list(iter(next_job, None)):  # an array of all that can be started now
        with executor.batch():
            submitted = [executor.submit(_Requeued(function), *job) for job in jobs]
        for job in submitted:
            job.exception()  # waits; what became of it is read from its files
            advance()


@dataclass(frozen=True)
class _Requeued:
    """A function that submitit queues again, with the same arguments, when Slurm preempts its job or its time is up."""

    function: Callable[..., Any]

    def __call__(self, *job: Any) -> None:
        self.function(*job)

    def checkpoint(self, *job: Any) -> Any:
        """Called by submitit in the job, before it ends."""
        return _need("submitit").helpers.DelayedSubmission(self, *job)


def _on_ray(function: Callable[..., Any], next_job: NextJob, advance: Callable[[], None], address: str | None) -> None:
    ray = _need("ray")
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=0)(function)
    running = []
    while True:
        running += [remote.remote(*job) for job in iter(next_job, None)]
        if not running:
            return
        ended, running = ray.wait(running)  # one that was killed has ended, too; its files say so
        for _ in ended:
            advance()


def _need(package: str) -> Any:
    """A package of the extra ``cluster``."""
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(
            f"{package} is not installed; install it by: pip install 'metacontroller-rl[cluster]'."
        ) from error
