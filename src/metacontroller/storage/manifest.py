"""Atomic writes, and manifest.json, which lists them: what was cut, flipped, swapped or is newer is refused by name.

    {"format": 1, "files": {"NAME.safetensors": {"config": [SHA-256], "versions": [{"size": ..., "sha256": ...}]}}}

A file is listed before it is put in its place, beside its versions before: a kill in between leaves one that is listed.
``config`` are the SHA-256 of the config.json with which a safetensors file was made and of those that have amended it
since: they say which run it belongs to. metrics.jsonl, to which lines are appended, is listed with each safetensors
file as far as it goes then: what stands after that is written again when the run is resumed.

JSON that no manifest lists, such as a dataset's, carries a SHA-256 of its own, see `seal`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metacontroller.errors import UserError
from metacontroller.storage.files import (
    MANIFEST,
    check_regular,
    draft_file,
    file_digest,
    folder_lock,
    is_file_digest,
    read_json,
)

FORMAT = 1
CONFIG, METRICS, TENSORS = "config.json", "metrics.jsonl", ".safetensors"
MAX_VERSIONS = 4
"""Versions of a file that stay listed: each that a kill keeps from its place takes one."""
SEAL = "sealed"
_MEND = "copy it from where it was made, or delete it and run again what made it."
_warned: set[Path] = set()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`; it replaces `path` when the block succeeds, and is removed otherwise.

    The file gets the permissions that the process's umask leaves, whatever wrote it, and is listed in the manifest of
    its run folder, if it has one.
    """
    with draft_file(path) as draft:
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)
        _sync(draft)
        _record(path, draft)
        os.replace(draft, path)
    if os.name == "posix":  # the new name is on disk only once its folder is; other systems cannot sync a folder
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file, in UTF-8."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


def begin(folder: Path) -> None:
    """Makes the manifest of a folder that has none; files that are there already are listed as they are."""
    if (folder / MANIFEST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    present = [path for pattern in ("*", "analyses/*", "snapshots/*") for path in sorted(folder.glob(pattern))]
    with folder_lock(folder.resolve()):
        if not (folder / MANIFEST).exists():
            listed = [path for path in present if _is_listed(path) and path.is_file()]
            _write(folder, {_key(folder, path): {"versions": [file_digest(path)]} for path in listed})


def amend(folder: Path, config: bytes) -> None:
    """Lists that what was made with config.json is right for ``config`` too, which is about to replace it."""
    new = hashlib.sha256(config).hexdigest()
    with folder_lock(folder.resolve()):
        files, old = _read(folder), file_digest(folder / CONFIG)["sha256"]
        for entry in files.values():
            if old in entry.get("config", ()) and new not in entry["config"]:
                entry["config"].append(new)
        _write(folder, files)


def _record(path: Path, draft: Path) -> None:
    """Lists the content of ``draft``, which is about to become ``path``; nothing outside of run folders."""
    folder = _folder_of(path)
    if folder is None or not _is_listed(path):
        return
    new = file_digest(draft)
    with folder_lock(folder.resolve()):  # two phases may write to one folder side by side
        files, key = _read(folder), _key(folder, path)
        before = [version for version in files.get(key, {}).get("versions", []) if version != new]
        files[key] = {"versions": [new, *before][:MAX_VERSIONS]}
        if path.suffix == TENSORS:
            if (folder / CONFIG).is_file():
                files[key]["config"] = [file_digest(folder / CONFIG)["sha256"]]
            metrics = folder / METRICS
            if metrics.is_file() and not metrics.is_symlink() and (lines := _digest_of_lines(metrics))["size"]:
                files[METRICS] = {"versions": [lines]}
        _write(folder, files)


def _digest_of_lines(path: Path) -> dict[str, Any]:
    """`file_digest` up to the last whole line, which is synced first: a crash must not lose what is listed."""
    size, digest, rest = 0, hashlib.sha256(), b""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        while piece := file.read(1 << 20):
            lines, end, rest = (rest + piece).rpartition(b"\n")
            digest.update(lines + end)
            size += len(lines + end)
    return {"size": size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    # Windows syncs only what is open for writing, and a folder can be opened for reading only.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; UserError if it holds anything else, or is not what its run wrote."""
    value = read_json(path)
    verify(path)
    return value


def verify(path: Path) -> None:
    """UserError unless a file is a regular one that the manifest of its folder lists; a folder without one is told
    once."""
    check_regular(path)
    folder = _folder_of(path)
    if folder is None:
        _warn_unchecked(path.parent)
        return
    entry = _read(folder).get(_key(folder, path))
    if entry is None:
        raise UserError(f"{path} is not of this run: {folder / MANIFEST} does not list it; write it with this library.")
    check_file(path, *entry["versions"])
    config = folder / CONFIG
    if "config" in entry and config.is_file() and file_digest(config)["sha256"] not in entry["config"]:
        raise UserError(f"{path} was made with another {CONFIG} than that of {folder}; {_MEND}")


def check_file(path: Path, *listed: Mapping[str, Any], read: bool = True) -> None:
    """UserError unless a file is a regular one and one of those that were listed, see `file_digest`; by its size alone
    unless it is to be read."""
    size = check_regular(path)
    if size not in [version["size"] for version in listed]:
        written = listed[0]["size"]
        raise UserError(f"{path} has {size} bytes where {written} were written: it was cut or swapped; {_MEND}")
    if read and file_digest(path) not in listed:
        raise UserError(f"{path} is not what was written (its SHA-256 differs): it was changed or swapped; {_MEND}")


def listed_metrics(folder: Path) -> dict[str, Any] | None:
    """The size and SHA-256 of the first part of metrics.jsonl; None where none is listed. Ask before reading it."""
    if not (folder / MANIFEST).exists():
        if (folder / METRICS).exists():
            _warn_unchecked(folder)
        return None
    entry = _read(folder).get(METRICS)
    return None if entry is None else entry["versions"][0]


def _warn_unchecked(folder: Path) -> None:
    if (folder / CONFIG).exists() and folder not in _warned:
        _warned.add(folder)
        print(f"metacontroller: {folder} has no {MANIFEST}: its files are read unchecked.", file=sys.stderr, flush=True)


def _folder_of(path: Path) -> Path | None:
    """The nearest folder above a file, of two, that has a manifest."""
    return next((folder for folder in list(path.parents)[:2] if (folder / MANIFEST).exists()), None)


def _is_listed(path: Path) -> bool:
    return path.suffix in (".json", TENSORS) and path.name != MANIFEST and not path.name.startswith(".")


def _key(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _read(folder: Path) -> dict[str, Any]:
    """The entries; UserError for a manifest that is damaged or of a newer release."""
    path = folder / MANIFEST
    content = read_json(path)
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise UserError(f"{path} has format {content['format']} and this release reads {FORMAT}; take a newer one.")
    files: Any = content.get("files")
    if content.keys() != {"format", "files"} or content["format"] != FORMAT or not _is_sound(files):
        raise UserError(f"{path} is damaged; copy it from where it was made, or delete it to read the files unchecked.")
    for entry in files.values():
        if isinstance(entry.get("config"), str):  # as older releases wrote it
            entry["config"] = [entry["config"]]
    return files


def _is_sound(files: Any) -> bool:
    def sound(entry: Any) -> bool:
        if not isinstance(entry, dict) or not {"versions"} <= entry.keys() <= {"versions", "config"}:
            return False
        versions, config = entry["versions"], entry.get("config", "")
        if not isinstance(versions, list) or not versions or not all(map(is_file_digest, versions)):
            return False
        return isinstance(config, str) or (isinstance(config, list) and all(isinstance(one, str) for one in config))

    return isinstance(files, dict) and all(map(sound, files.values()))


def _write(folder: Path, files: dict[str, Any]) -> None:
    """Atomically, but not synced: after a crash of the machine a lost manifest can be deleted, files cannot."""
    with draft_file(folder / MANIFEST) as draft:
        draft.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, folder / MANIFEST)


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their SHA-256 under `SEAL`."""
    values = json.loads(json.dumps({name: value for name, value in content.items() if name != SEAL}))
    return {**values, SEAL: _seal_of(values)}


def check_seal(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """What was sealed, of what was read from a file; UserError unless that is the same."""
    values = {name: value for name, value in content.items() if name != SEAL}
    if content.get(SEAL) != _seal_of(values):
        raise UserError(f"{path} is not what was written (its SHA-256 differs): it was changed; {_MEND}")
    return values


def _seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.JSONEncoder(sort_keys=True).encode(content).encode()).hexdigest()
