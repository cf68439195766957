"""What tests of several folders share: scripts as modules, and runs whose models learned nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from metacontroller.phases.artefacts import BASE_MODEL, META_CONTROLLER, artefact_path
from metacontroller.presets import preset
from metacontroller.recipes.config import build_meta_controller, build_model, to_json
from metacontroller.storage.run_folder import RunFolder


def load_script(path: Path) -> ModuleType:
    """A script outside of the package, such as an example or a benchmark, as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untrained_run(path: Path) -> RunFolder:
    """A run of the preset debug, with models that were not trained."""
    config, folder = preset("debug"), RunFolder(path)
    folder.write_config(to_json(config))
    build_model(config).save(artefact_path(folder, BASE_MODEL))
    build_meta_controller(config).save(artefact_path(folder, META_CONTROLLER))
    return folder


@contextmanager
def quick_reproductions(*, drawn: bool = False) -> Iterator[pytest.MonkeyPatch]:
    """Context in which a reproduction runs in this process, hardly trains the reader of codes, and leaves its figures
    out unless they are to be drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metacontroller.recipes.reproduce.usable_cores", lambda: 1)
        patch.setattr("metacontroller.analysis.oracle.READER_UPDATES", 5)
        if not drawn:
            patch.setattr("metacontroller.report.figures.draw_run", lambda *_: None)
            patch.setattr("metacontroller.report.figures.draw_all", lambda *_: None)
        yield patch
