"""manifest.json: what a run folder holds, so that a file that was cut, flipped, swapped or is newer is refused by name.

    {"format": 1, "files": {"base_model.safetensors": {"config": SHA-256, "versions": [{"size": ..., "sha256": ...}]}}}

A file is listed before it is put in its place, beside its versions before: a kill in between leaves one that is listed.
``config`` is the SHA-256 of the config.json with which a safetensors file was made, or a list with those that have
amended it since: it says which run it belongs to.
metrics.jsonl, to which lines are appended, is listed with each safetensors file as far as it goes then: what stands
after that is written again when the run is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from metacontroller.errors import UserError
from metacontroller.storage.drafts import drafting
from metacontroller.storage.plain_files import file_digest, read_json

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

NAME, FORMAT = "manifest.json", 1
CONFIG = "config.json"
METRICS = "metrics.jsonl"
LISTED = (".json", ".safetensors")
KEPT = 4
"""Versions of a file that stay listed: each that a kill keeps from its place takes one."""

_warned: set[Path] = set()
_hashed: dict[Path, _Lines] = {}
"""Of the metrics of the folders that this process writes to."""


def begin(folder: Path) -> None:
    """Makes the manifest of a folder that has none; files that are there already are listed as they are."""
    if (folder / NAME).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = [path for pattern in ("*", "analyses/*", "snapshots/*") for path in sorted(folder.glob(pattern))]
    with _alone(folder):
        if not (folder / NAME).exists():
            files = {_key(folder, path): {"versions": [file_digest(path)]} for path in found if _listed(path)}
            _write(folder, files)


def record(path: Path, draft: Path) -> None:
    """Lists the content of ``draft``, which is about to become ``path``; nothing outside of run folders."""
    folder = _folder_of(path)
    if folder is None or path.suffix not in LISTED or path.name == NAME:
        return
    new = file_digest(draft)
    with _alone(folder):
        files, key = _read(folder), _key(folder, path)
        versions = [version for version in files.get(key, {}).get("versions", []) if version != new]
        files[key] = {"versions": [new, *versions][:KEPT]}
        if path.suffix == ".safetensors" and (folder / CONFIG).is_file():
            files[key]["config"] = file_digest(folder / CONFIG)["sha256"]
        if path.suffix == ".safetensors":
            _record_lines(folder, files)
        _write(folder, files)


def _record_lines(folder: Path, files: dict[str, Any]) -> None:
    """Lists metrics.jsonl up to its last whole line, which is synced first: a crash must not lose what is listed."""
    path = folder / METRICS
    if not path.is_file() or path.is_symlink():
        return
    lines = _hashed.setdefault(path.resolve(), _Lines())
    if lines.read(path) or (lines.size and METRICS not in files):
        files[METRICS] = {"versions": [{"size": lines.size, "sha256": lines.digest.hexdigest()}]}


def verify(path: Path) -> None:
    """UserError unless the manifest of the file's folder lists its content; a folder without one is told once."""
    folder = _folder_of(path)
    if folder is None:
        _say_unchecked(path.parent)
        return
    entry = _read(folder).get(_key(folder, path))
    mend = f"copy it from where it was made, or delete it and run again what made it; {folder / NAME} lists what is."
    if entry is None:
        raise UserError(f"{path} is not of this run: {folder / NAME} does not list it; write it with this library.")
    size, listed = path.stat().st_size, entry["versions"]
    if size not in {version["size"] for version in listed}:
        raise UserError(
            f"{path} has {size} bytes where {listed[0]['size']} were written: it was cut or swapped; {mend}"
        )
    if file_digest(path) not in listed:
        raise UserError(f"{path} is not what was written (its SHA-256 differs): it was changed or swapped; {mend}")
    config = folder / CONFIG
    if "config" in entry and config.is_file() and file_digest(config)["sha256"] not in _configs(entry):
        raise UserError(f"{path} was made with another {CONFIG} than that of {folder}; {mend}")


def amend(folder: Path, config: bytes) -> None:
    """Lists that what was made with config.json is right for ``config`` too, which is about to replace it."""
    new = hashlib.sha256(config).hexdigest()
    with _alone(folder):
        files, old = _read(folder), file_digest(folder / CONFIG)["sha256"]
        for entry in files.values():
            if "config" in entry and old in _configs(entry) and new not in _configs(entry):
                entry["config"] = [*_configs(entry), new]
        _write(folder, files)


def listed_metrics(folder: Path) -> dict[str, Any] | None:
    """The size and SHA-256 of the first part of metrics.jsonl; None where none is listed. Ask before reading it."""
    if not (folder / NAME).exists():
        if (folder / METRICS).exists():
            _say_unchecked(folder)
        return None
    entry = _read(folder).get(METRICS)
    return None if entry is None else entry["versions"][0]


def _say_unchecked(folder: Path) -> None:
    """Tells once that a run's folder has no manifest."""
    if (folder / CONFIG).exists() and folder not in _warned:
        _warned.add(folder)
        print(f"metacontroller: {folder} has no {NAME}: its files are read unchecked.", file=sys.stderr, flush=True)


def _configs(entry: dict[str, Any]) -> list[str]:
    return [entry["config"]] if isinstance(entry["config"], str) else entry["config"]


# -- the file ---------------------------------------------------------------------------------------------------------


class _Lines:
    """The SHA-256 of the whole lines of a file that grows: each byte is read once."""

    def __init__(self) -> None:
        self.inode, self.size, self.digest = 0, 0, hashlib.sha256()

    def read(self, path: Path) -> bool:
        """Goes on to the last whole line; returns whether there are more than the last time, and then syncs them."""
        handle = os.open(path, os.O_RDWR)
        try:
            found = os.fstat(handle)
            if found.st_ino != self.inode or found.st_size < self.size:  # another file of that name
                self.inode, self.size, self.digest = found.st_ino, 0, hashlib.sha256()
            os.lseek(handle, self.size, os.SEEK_SET)
            before, left = self.size, b""
            while piece := os.read(handle, 1 << 20):
                whole, end, left = (left + piece).rpartition(b"\n")
                self.digest.update(whole + end)
                self.size += len(whole + end)
            if self.size > before:
                os.fsync(handle)
            return self.size > before
        finally:
            os.close(handle)


def _folder_of(path: Path) -> Path | None:
    """The nearest folder above a file, of two, that has a manifest."""
    return next((folder for folder in list(path.parents)[:2] if (folder / NAME).exists()), None)


def _listed(path: Path) -> bool:
    return path.suffix in LISTED and path.name != NAME and not path.name.startswith(".") and path.is_file()


def _key(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _read(folder: Path) -> dict[str, Any]:
    """The entries; UserError for a manifest that is damaged or of a newer release."""
    path = folder / NAME
    content = read_json(path)
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise UserError(f"{path} has format {content['format']} and this release reads {FORMAT}; take a newer one.")
    files = content.get("files")
    if content.keys() != {"format", "files"} or content["format"] != FORMAT or not _sound(files):
        raise UserError(f"{path} is damaged; copy it from where it was made, or delete it to read the files unchecked.")
    return files


def _sound(files: Any) -> TypeGuard[dict[str, Any]]:
    if not isinstance(files, dict):
        return False
    for entry in files.values():
        if not isinstance(entry, dict) or not entry.keys() <= {"versions", "config"} or not entry.get("versions"):
            return False
        if not isinstance(entry.get("config", ""), str | list) or not isinstance(entry["versions"], list):
            return False
        if "config" in entry and not all(isinstance(config, str) for config in _configs(entry)):
            return False
        for version in entry["versions"]:
            if not isinstance(version, dict) or version.keys() != {"size", "sha256"}:
                return False
            if type(version["size"]) is not int or not isinstance(version["sha256"], str):
                return False
    return True


def _write(folder: Path, files: dict[str, Any]) -> None:
    """Atomically, but not synced: after a crash of the machine a lost manifest can be deleted, files cannot."""
    with drafting(folder / NAME) as draft:
        draft.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, folder / NAME)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two phases may write to one folder side by side: each change of the manifest is made by one at a time."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not lock folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
