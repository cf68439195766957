"""Experiment trackers: also sends every scalar that a run logs to TensorBoard, Trackio or Weights & Biases.

Off by default, and nothing leaves the machine: TensorBoard and Trackio write files, Weights & Biases runs offline
unless its own settings (``WANDB_MODE``) change that. metrics.jsonl remains the record; trackers are never read.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from metacontroller.errors import UserError
from metacontroller.storage.run_folder import RunFolder

Tracker = Literal["tensorboard", "trackio", "wandb"]
"""Where scalars go in addition to metrics.jsonl."""

Log = Callable[[str, int, Mapping[str, float]], None]
"""``log(phase, step, values)``."""


def track_with(run: RunFolder, tracker: Tracker | None) -> RunFolder:
    """Returns the run folder after connecting it to a tracker, if one is given; UserError if it is not installed."""
    if tracker is not None:
        run.listeners.append({"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[tracker](run))
    return run


def _tensorboard(run: RunFolder) -> Log:
    folder = str(run.within("tensorboard"))
    writer = _need("torch.utils.tensorboard", "tensorboard").SummaryWriter(folder)

    def log(phase: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{phase}/{name}", value, step)
        writer.flush()

    return log


def _trackio(run: RunFolder) -> Log:
    os.environ.setdefault("TRACKIO_DIR", str(run.within("trackio")))
    trackio = _need("trackio", "trackio")
    trackio.init(project="metacontroller", name=run.path.name, embed=False)
    return lambda phase, step, values: trackio.log({f"{phase}/{name}": value for name, value in values.items()}, step)


def _wandb(run: RunFolder) -> Log:
    path = run.within("wandb").parent  # where it makes a folder of that name
    wandb = _need("wandb", "wandb")
    path.mkdir(parents=True, exist_ok=True)
    mode = os.environ.get("WANDB_MODE", "offline")
    session = wandb.init(project="metacontroller", name=path.name, dir=str(path), mode=mode, reinit="create_new")

    def log(phase: str, step: int, values: Mapping[str, float]) -> None:
        # each phase counts its own steps, so they are values and not W&B's own, which may only grow
        session.log({f"{phase}/step": step, **{f"{phase}/{name}": value for name, value in values.items()}})

    return log


def _need(module: str, package: str) -> Any:
    """Imports a module of the extra ``track``; UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{package} is not installed; install it by: pip install 'metacontroller-rl[track]'."
        ) from error
