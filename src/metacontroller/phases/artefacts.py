"""What the phases leave in a run folder, by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from metacontroller.errors import MissingFileError
from metacontroller.storage.files import replacing
from metacontroller.storage.run_folder import RunFolder

BASE_MODEL = "base_model"
RAW_MODEL = "raw_action_model"
COTRAINED_MODEL = "cotrained_model"
META_CONTROLLER = "meta_controller"
SEGMENTATION = "compile"
POLICY = "internal_rl_policy"
_MADE_BY = {
    BASE_MODEL: "pretrain",
    RAW_MODEL: "internal-rl --raw",
    COTRAINED_MODEL: "discover",
    META_CONTROLLER: "discover",
    SEGMENTATION: "discover",
    POLICY: "internal-rl",
}


def load_artefact(kind: type, run: RunFolder, name: str, device: str) -> Any:
    """The module that a phase left in the run folder; MissingFileError says which phase to run first."""
    path = run.path / f"{name}.safetensors"
    if not path.exists():
        raise MissingFileError(f"{run.path} has no {path.name}; run `metacontroller {_MADE_BY[name]}` on it first.")
    return kind.init_and_load(path).to(device)


def copy_artefact(name: str, source: Path, folder: Path) -> None:
    """Copies what a phase left in the folder ``source``, if it is there; under its name only once it is whole."""
    path = source / f"{name}.safetensors"
    if path.exists():
        with replacing(folder / path.name) as draft:
            shutil.copyfile(path, draft)
