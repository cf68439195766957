"""Progress of a long loop: a live bar on a terminal, an occasional line elsewhere, nothing when quiet.

with track(steps, "pretrain") as progress:
    for step in range(1, steps + 1):
        loss = ...
        progress.update(step, loss=loss)

A worker among several calls `label_lines` first, so that one can tell whose lines they are.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import rich.progress
from rich.console import Console

_LABEL = ContextVar("label", default="")


def label_lines(label: str) -> None:
    """Begin every plain line of this process with `label`, such as 'seed 1'."""
    _LABEL.set(f"{label}, ")


def announce(text: str, quiet: bool = False) -> None:
    """Write one line about the next piece of work to standard error; nothing if `quiet`."""
    if not quiet:
        print(f"{_LABEL.get()}{text}", file=sys.stderr, flush=True)


def track(
    total: int, description: str, *, start: int = 0, quiet: bool = False, console: Console | None = None
) -> Progress:
    """Return a progress display: a bar on a terminal, plain lines elsewhere, none if `quiet`.

    A worker process writes plain lines on a terminal too: bars of several processes would overwrite each other.
    `start` is the step that a resumed loop continues from, so that the rate counts only new steps. Output goes to
    standard error unless a `console` is given, so that results printed to standard output stay clean.
    """
    console = console or Console(stderr=True)
    alone = multiprocessing.parent_process() is None
    kind = Progress if quiet else BarProgress if console.is_terminal and alone else LineProgress
    return kind(total, description, start=start, console=console)


class Progress:
    """A context manager whose `update` is called at each step; this class shows nothing, its subclasses do.

    Metrics may be one-element tensors: they are read only when shown, so that not every step synchronizes with a GPU.
    """

    interval_s = float("inf")
    """Shortest time between two displays, seconds."""

    def __init__(
        self,
        total: int,
        description: str,
        *,
        start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.description = total, description
        self._start = self._step = start
        self._metrics: dict[str, Any] = {}
        self._unshown = True  # whether an update has not been shown yet
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._began = self._shown = clock()

    def __enter__(self) -> Progress:
        self._began = self._shown = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        if self._unshown:
            self._show()

    def update(self, step: int, **metrics: Any) -> None:
        """Report that `step` steps of the total are done, and the metrics there."""
        self._step = step
        self._metrics.update(metrics)
        now = self._clock()
        self._unshown = now - self._shown < self.interval_s
        if not self._unshown:
            self._shown = now
            self._show()

    @property
    def rate(self) -> float:
        """Steps a second since the loop was entered; 0 before the first."""
        elapsed = self._clock() - self._began
        return (self._step - self._start) / elapsed if elapsed > 0 else 0.0

    def _measured(self) -> str:
        """Return the rate and the metrics as text, such as '81.3/s  loss 0.361'."""
        values = [f"{name} {float(value):.4g}" for name, value in self._metrics.items()]
        return "  ".join([f"{self.rate:.3g}/s", *values])

    def _show(self) -> None:
        """Show the current state; the base class shows nothing."""


class LineProgress(Progress):
    """One plain line at most every ten seconds, and a last one."""

    interval_s = 10.0

    def _show(self) -> None:
        line = f"{_LABEL.get()}{self.description}: {self._step}/{self.total}  {self._measured()}"
        print(line, file=self._console.file, flush=True)


class BarProgress(Progress):
    """A live bar with the time left, the rate and the metrics."""

    interval_s = 0.25

    def __enter__(self) -> Progress:
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            rich.progress.TextColumn("{task.fields[measured]}"),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(self.description, total=self.total, completed=self._start, measured="")
        self._bar.start()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._bar.stop()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._step, measured=self._measured())
