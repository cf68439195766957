"""The files that the phases write to a run folder, by name."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacontroller.arguments import checked_kinds
from metacontroller.errors import MissingFileError
from metacontroller.storage.files import inside
from metacontroller.storage.manifest import replacing, verify
from metacontroller.storage.module_file import Saveable
from metacontroller.storage.run_folder import RunFolder
from metacontroller.storage.versions import check_versions, record_in
from metacontroller.training.distributed import Processes

BASE_MODEL = "base_model"
RAW_MODEL = "raw_action_model"
COTRAINED_MODEL = "cotrained_model"
META_CONTROLLER = "meta_controller"
SEGMENTATION = "compile"
POLICY = "internal_rl_policy"
EVOLVED = "evolved_policy"
_MADE_BY = {
    BASE_MODEL: "pretrain",
    RAW_MODEL: "internal-rl --raw",
    COTRAINED_MODEL: "discover",
    META_CONTROLLER: "discover",
    SEGMENTATION: "discover",
    POLICY: "internal-rl",
    EVOLVED: "evolve",
}

_warned: set[Path] = set()
"""Files without a record, of which was warned."""


@checked_kinds
def artefact_path(run: RunFolder, name: str) -> Path:
    """The file of a module that a phase writes, such as `BASE_MODEL`."""
    return run.within(f"{name}.safetensors")


def save_artefacts(run: RunFolder, workers: Processes, modules: Mapping[str, Saveable]) -> None:
    """Writes each module as the artefact of its name. The first process does, and none goes on before it has."""
    if workers.is_main:
        for name, module in modules.items():
            module.save(artefact_path(run, name))
    workers.wait()


@checked_kinds
def load_artefact(kind: type, run: RunFolder, name: str, device: str) -> Any:
    """The module that a phase wrote to the run folder; MissingFileError names the phase to run first.

    Warns if it was made with other versions than the folder's, and once if it does not say; UserError if it was learned
    from other data.
    """
    path = artefact_path(run, name)
    if not path.exists():
        raise MissingFileError(f"{run.path} has no {path.name}; run `metacontroller {_MADE_BY[name]}` on it first.")
    module = kind.init_and_load(path)
    if name == BASE_MODEL and run.versions and not module.versions and path not in _warned:
        _warned.add(path)
        warnings.warn(
            f"{path} keeps no record of its world and versions, as older ones: they are not compared.", stacklevel=2
        )
    check_versions(path, module.versions, run.versions)
    return module.to(device)


def learned_from(run: RunFolder) -> dict[str, str]:
    """The record (`storage.versions`) of a run's base model, or of pretraining's checkpoint before there is one; empty
    if there is neither, or if it keeps none."""
    for path in (artefact_path(run, BASE_MODEL), run.checkpoint_path("pretrain")):
        if path.exists():
            return record_in(path)
    return {}


def copy_artefact(name: str, source: Path, folder: Path, as_name: str | None = None) -> None:
    """Copies the file that a phase wrote to the folder ``source``, if there is one, perhaps under another name;
    atomically. UserError for a file that is not what the phase wrote."""
    path = inside(source, source / f"{name}.safetensors")
    if path.exists():
        verify(path)
        with replacing(folder / f"{as_name or name}.safetensors") as draft:
            shutil.copyfile(path, draft)
