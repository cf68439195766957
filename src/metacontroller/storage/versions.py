"""Records of where data and weights come from, kept in files and compared when they are read.

    {"environment": "Hopper-v5", "gymnasium": "1.4.0", "mujoco": "4.0.0", "metacontroller-rl": "0.1.0"}

A record names the environment, and the versions of the packages on which its episodes depend. That of weights learned
from a dataset of the user's names the dataset's content too, by its digest.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from metacontroller.errors import UserError
from metacontroller.storage.tensor_file import read_header

OWN_PACKAGE = "metacontroller-rl"
ENVIRONMENT, DATA = "environment", "data"
"""Entries of a record that are no packages."""
_LEFT_OUT = {"numpy", "torch", "metacontroller"}
"""Modules that environments of all kinds hold and do not depend on, and ours, which every record has."""


def record(environment: str | None, modules: Iterable[str] = ()) -> dict[str, str]:
    """The environment's ID, if there is one, and the versions of this package and of those that installed the modules.

    Modules that no package installed, such as the user's own, are left out.
    """
    packages = {_package(module) for module in {*modules} - sys.stdlib_module_names - _LEFT_OUT}
    versions = {name: _version(name) for name in sorted({OWN_PACKAGE, *packages})}
    world = {} if environment is None else {ENVIRONMENT: environment.rpartition(":")[2]}
    return world | {name: version for name, version in versions.items() if version is not None}


@cache
def _package(module: str) -> str:
    """The package that installed a module of that name."""
    if _version(module) is not None:
        return module
    return min(metadata.packages_distributions().get(module, []), default=module)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def record_in(path: Path) -> dict[str, str]:
    """The record that a module's file or a checkpoint keeps; empty if none. UserError for another file."""
    header = read_header(path)
    try:
        return {str(name): str(version) for name, version in header.get("meta", header).get("versions", {}).items()}
    except AttributeError as error:
        raise UserError(f"{path} is no file of a run ({error}); take another copy.") from None


def check_versions(path: str | Path, made_with: Mapping[str, str], here: Mapping[str, str]) -> None:
    """UserError if a file was learned from a dataset of another content than the one that is here; warns for another
    environment than the one that the file was made in, and for each package of another version.

    What only one of the two names is no matter, nor is the version of this package: else each release would warn of
    every older file.
    """
    for name in sorted((made_with.keys() & here.keys()) - {OWN_PACKAGE}):
        made, now = made_with[name], here[name]
        if made == now:
            continue
        if name == DATA:
            raise UserError(
                f"{path} was learned from other data than the run's dataset holds now (SHA-256 {made[:12]} and "
                f"{now[:12]}); put the old data back, name their place by --dataset PATH, or begin anew in another "
                "folder."
            )
        if name == ENVIRONMENT:
            difference = (
                f"in {made} and this is {now}: rewards, sizes and observations may differ where shapes do not. Name "
                f"{made}, or make the file anew in {now}."
            )
        else:
            difference = (
                f"with {name} {made} and {now} is installed: the world may behave otherwise. Install {name}=={made}, "
                "or make the file anew."
            )
        warnings.warn(f"{path} was made {difference}", stacklevel=2)
