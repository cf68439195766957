"""Being told to stop: SIGTERM or SIGINT ends a command within five seconds, with its update and checkpoint.

A loop of updates runs ``with finishing():`` and asks `requested` after each; elsewhere the signal raises `Interrupted`
at once. An update that takes more than `GRACE_S` is given up: the run then resumes from the checkpoint before. Python
code that does not run under `listening` meets signals as ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

GRACE_S = 3.0
"""Seconds from the signal in which an update and its checkpoint may be finished."""

LAST_S = 4.6
"""Seconds from the signal after which the process ends whatever it does."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop. number: of the signal; status: with which the process then exits."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.status = number, 128 + number


class _Request:
    """What this process was asked, and what it is doing: one object, because signals are the process's.

    farewell: called with the signal's number before the process has to end at once.
    """

    def __init__(self, farewell: Callable[[int], None] = lambda number: None) -> None:
        self.farewell = farewell
        self.number: int | None = None  # of the signal
        self.raised = False
        self.late = False  # whether GRACE_S has passed
        self.starting = False
        self.depth = 0  # of `finishing`

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """A second signal changes nothing: the process is about to end."""
        if self.number is not None:
            return
        self.number = number
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, GRACE_S, LAST_S - GRACE_S)
        if self.starting:
            self.end()
        if not self.depth:
            self.stop()

    def on_alarm(self, number: int, frame: FrameType | None) -> None:
        """First the update is given up, then the process."""
        if self.late:
            self.end()
        self.late = True
        if not self.raised:
            self.stop()

    def stop(self) -> None:
        self.raised = True
        raise Interrupted(self.number or signal.SIGTERM)

    def end(self) -> None:
        number = self.number or signal.SIGTERM
        self.farewell(number)
        os._exit(128 + number)


_request = _Request()


@contextmanager
def listening(farewell: Callable[[int], None], *, ignored: tuple[int, ...] = ()) -> Iterator[None]:
    """Context in which SIGTERM and SIGINT, but for those ``ignored``, mean what this module says.

    farewell(number): called before the process has to end at once, which it also does while it is `starting`. Only the
    main thread may listen; in another this does nothing.
    """
    global _request
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request = _Request(farewell)
    handlers: dict[int, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGINT), _request.on_signal)
    handlers |= dict.fromkeys(ignored, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        handlers[signal.SIGALRM] = _request.on_alarm
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _request = _Request()


@contextmanager
def starting() -> Iterator[None]:
    """Context of imports, in which there is nothing to save: a signal ends the process at once."""
    _request.starting = True
    try:
        yield
    finally:
        _request.starting = False


@contextmanager
def finishing() -> Iterator[None]:
    """Context of updates that a signal does not interrupt. An error after a signal counts as the interruption: worker
    processes are told to stop too, and some die of it."""
    _request.depth += 1
    try:
        yield
    except Exception as error:
        if _request.number is None:
            raise
        raise Interrupted(_request.number) from error
    finally:
        _request.depth -= 1


def requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _request.number is not None


def stop() -> None:
    """Raises `Interrupted`, by the signal that came to this process or, if it came to another, by SIGTERM."""
    _request.stop()


def say(line: str) -> None:
    """One line on standard error, if there still is one."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
