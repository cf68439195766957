"""Training that diverges: it stops at the first number that is not finite, and leaves what it takes to see why.

    RUN/diverged/PHASE.json         where and what
    RUN/diverged/PHASE.safetensors  the module's tensors as ``module.NAME``, and the batch

The update that met the number is not made, and the last checkpoint stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from metacontroller.errors import DivergedError
from metacontroller.storage.files import strict_json
from metacontroller.storage.manifest import replacing, write_text
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.tensor_file import not_finite, write_tensors
from metacontroller.storage.training_state import module_tensors

FOLDER = "diverged"


class NotFinite(ArithmeticError):
    """what: which number is not finite, such as "the loss is nan"."""


def check_module(module: nn.Module) -> None:
    """NotFinite names the first parameter or buffer that is not finite; reads them all."""
    name = not_finite(module.state_dict())
    if name is not None:
        raise NotFinite(f"the parameter {name} is not finite")


def check_returns(returns: Tensor) -> None:
    """NotFinite unless the returns (b,) of a batch of episodes are finite."""
    if not bool(returns.isfinite().all()):
        raise NotFinite("the return of an episode is not finite")


def diverged(
    run: RunFolder,
    phase: str,
    update: int,
    cause: NotFinite,
    module: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    writes: bool = True,
    **facts: Any,
) -> DivergedError:
    """The error to raise where update number ``update``, counted from 1, of a phase met ``cause``.

    module: as it was before the update. batch: what the update learned from. facts: numbers for the JSON file. writes:
    whether this process leaves the two files.
    """
    last = f"{run.checkpoint_path(phase).name}, as it was" if run.has_checkpoint(phase) else "none yet"
    if writes:
        tensors = {**module_tensors("module", module), **{f"batch.{name}": value for name, value in batch.items()}}
        with replacing(run.within(f"{FOLDER}/{phase}.safetensors")) as draft:
            write_tensors(draft, tensors)
        content = {"phase": phase, "update": update, "found": str(cause), "checkpoint": last, **facts}
        write_text(run.within(f"{FOLDER}/{phase}.json"), json.dumps(strict_json(content), indent=2) + "\n")
    return DivergedError(
        f"{phase} diverged at update {update}: {cause}; the last checkpoint is kept ({last}), and "
        f"{run.path / FOLDER} holds the batch and the weights; start again with a lower learning rate or other data."
    )
