"""Many runs, each in a process of its own: one that is killed takes no other with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from metacontroller.phases.reproduce import start_worker

Job = tuple[Any, ...]


def in_own_processes(
    function: Callable[..., None], next_job: Callable[[], Job | None], workers: int, advance: Callable[[], None]
) -> None:
    """Calls ``function(*job)`` for each of the jobs that ``next_job`` gives, at most ``workers`` at the same time, with
    one thread each, and ``advance`` after each.

    next_job: returns None when there is nothing that can be started now; it is asked again when a process ends.
    """
    context, running = multiprocessing.get_context("spawn"), []
    try:
        while True:
            while len(running) < workers and (job := next_job()) is not None:
                process = context.Process(target=_alone, args=(function, job))
                process.start()
                running.append(process)
            if not running:
                return
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                running.remove(process)
                advance()
    except BaseException:
        for process in running:
            process.terminate()
        raise


def _alone(function: Callable[..., None], job: Job) -> None:
    start_worker()
    function(*job)
