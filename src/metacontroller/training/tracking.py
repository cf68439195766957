"""Experiment trackers: also sends every scalar that a run logs to TensorBoard, Trackio or Weights & Biases.

Off by default, and nothing leaves the machine: TensorBoard and Trackio write files, Weights & Biases runs offline
unless its own settings (``WANDB_MODE``) change that. metrics.jsonl remains the record; trackers are never read.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from metacontroller.errors import import_extra
from metacontroller.storage.run_folder import RunFolder

Tracker = Literal["tensorboard", "trackio", "wandb"]
"""Where scalars go in addition to metrics.jsonl."""

Log = Callable[[str, int, Mapping[str, float]], None]
"""``log(phase, step, values)``."""


def track_with(run: RunFolder, tracker: Tracker | None, *, quiet: bool = False) -> RunFolder:
    """Returns the run folder after connecting it to a tracker, if one is given; UserError if it is not installed.

    quiet: the tracker prints nothing either.
    """
    if tracker is not None:
        connect = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[tracker]
        run.listeners.append(connect(run, quiet))
    return run


def _tensorboard(run: RunFolder, quiet: bool) -> Log:
    folder = run.within("tensorboard")
    logged = _last_steps(run) if folder.exists() else {}
    writer = import_extra("torch.utils.tensorboard", "track").SummaryWriter(str(folder))

    def log(phase: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{phase}/{name}", value, step)
        writer.flush()

    return _once(log, logged)


def _trackio(run: RunFolder, quiet: bool) -> Log:
    os.environ.setdefault("TRACKIO_DIR", str(run.within("trackio")))
    logged = _last_steps(run) if Path(os.environ["TRACKIO_DIR"]).exists() else {}
    trackio = import_extra("trackio", "track")
    with redirect_stdout(StringIO()) if quiet else nullcontext():
        trackio.init(project="metacontroller", name=run.path.name, embed=False, resume="allow")
    if quiet:
        atexit.unregister(_finish)  # of an earlier phase
        atexit.register(_finish, trackio)

    def log(phase: str, step: int, values: Mapping[str, float]) -> None:
        trackio.log({f"{phase}/{name}": value for name, value in values.items()}, step)

    return _once(log, logged)


def _finish(trackio: Any) -> None:
    """What Trackio does itself at the end, with words."""
    with redirect_stdout(StringIO()):
        trackio.finish()


def _last_steps(run: RunFolder) -> dict[str, int]:
    """By phase the last step that was ever logged, also after the checkpoint from which a killed run resumes."""
    steps: dict[str, int] = {}
    for text in run.metrics_path.read_bytes().splitlines() if run.metrics_path.exists() else ():
        with suppress(ValueError, LookupError, TypeError):  # a torn line, which is no metrics yet
            line = json.loads(text)
            if "rewound" not in line:
                steps[line["phase"]] = max(line["step"], steps.get(line["phase"], 0))
    return steps


def _once(log: Log, logged: Mapping[str, int]) -> Log:
    """The same without the steps that a tracker knows: a resumed run logs them once more, with the same values."""
    return lambda phase, step, values: None if step <= logged.get(phase, -1) else log(phase, step, values)


def _wandb(run: RunFolder, quiet: bool) -> Log:
    path = run.within("wandb").parent  # where it makes a folder of that name
    wandb = import_extra("wandb", "track")
    path.mkdir(parents=True, exist_ok=True)
    if quiet:
        os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE", "offline")
    session = wandb.init(project="metacontroller", name=path.name, dir=str(path), mode=mode, reinit="create_new")

    def log(phase: str, step: int, values: Mapping[str, float]) -> None:
        # each phase counts its own steps, so they are values and not W&B's own, which may only grow
        session.log({f"{phase}/step": step, **{f"{phase}/{name}": value for name, value in values.items()}})

    return log
