"""Versions of packages on which a world's episodes depend, kept in files and compared when they are read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path


def warn_of_versions(path: str | Path, made_with: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Warns for each package of another version here than the one that the file was made with.

    Packages that only one of the two names are no matter.
    """
    for name in sorted(made_with.keys() & here.keys()):
        if made_with[name] != here[name]:
            warnings.warn(
                f"{path} was made with {name} {made_with[name]} and {here[name]} is installed: the world may behave "
                f"otherwise. Install {name}=={made_with[name]}, or make the file anew.",
                stacklevel=3,
            )
