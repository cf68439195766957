"""Episodes on disk, memory-mapped: a folder of plain arrays without padding."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from metacontroller.data.trajectories import Episodes, Trajectories
from metacontroller.errors import UserError
from metacontroller.ranges import check, require, shown
from metacontroller.storage.files import (
    check_regular,
    draft_folder,
    file_digest,
    is_file_digest,
    left_behind,
    read_json,
)
from metacontroller.storage.lock import locked
from metacontroller.storage.manifest import SEAL, check_file, check_seal, seal, write_text
from metacontroller.storage.versions import check_versions

STORE_FORMAT = 2
"""Format 1 had no sizes, no SHA-256 and no seal: it is read unchecked, which is said once."""
HEADER = "store.json"
REPLACED = ".replaced.json"
"""Names of files that a writer is about to bring or to remove, while it does."""
HASHED_ON_OPEN = 64 * 2**20
"""Bytes of arrays up to which they are verified when a store is opened; more take a noticeable time."""
_OWN = ("format", "arrays", "files", "listed", SEAL)
"""What a header says beside what ``write`` was given."""
_said: set[Path] = set()
_PIECE = 16 * 2**20
"""Bytes of an array that are written at a time."""
_FILE = re.compile(rf"({'|'.join(field.name for field in fields(Trajectories))})(-[0-9a-f]+)?\.npy")
"""Files of arrays: those of a store that replaces another have numbers in their names."""
_writing = threading.RLock()
"""Held by the thread that writes a store: the lock of a folder keeps other processes out, not other threads."""


class TrajectoryStore(Episodes):
    """Episodes on disk, memory-mapped: a folder of plain ``.npy`` arrays without padding and a ``store.json``.

    Loading runs no code: arrays are read with ``allow_pickle=False``. meta: what store.json holds, with whatever
    ``write`` was given. UserError if the folder is no store, if a file is not as long as it was written, and, for
    arrays of at most `HASHED_ON_OPEN` bytes, if their SHA-256 differ; see ``verify`` for larger ones.
    """

    def __init__(self, path: str | Path) -> None:
        require(isinstance(path, (str, os.PathLike)), "path", path, "the folder of a trajectory store")
        self.path = Path(path)
        if not (self.path / HEADER).is_file():
            raise UserError(f"{self.path} is not a trajectory store: it has no store.json; write one with `write`.")
        while True:
            header = _mark(self.path)
            try:
                self._load()
                return
            except (UserError, OSError):
                if header == _mark(self.path):  # else a writer has replaced the store meanwhile, and its old arrays
                    raise

    def _load(self) -> None:
        self.meta = _read_header(self.path)
        self._files = {name: self.path / file for name, file in _array_files(self.meta).items()}
        super().__init__({name: _open(file) for name, file in self._files.items()})
        self._check_arrays()
        listed = self.meta.get("listed", {})
        for name, entry in listed.items():
            check_file(self._files[name], entry, read=False)
        self._verified = not listed
        if sum(entry["size"] for entry in listed.values()) <= HASHED_ON_OPEN:
            self.verify()

    def _check_arrays(self) -> None:
        """UserError unless the arrays fit together."""
        lengths = self.lengths
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths) or lengths.min() < 1:
            raise UserError(f"{self.path} has lengths that are not whole numbers from 1; write the store again.")
        for name, array in self.arrays.items():
            expected = self.first_row(name, len(self))
            if len(array) != expected:
                raise UserError(f"{self.path} has {len(array)} {name} where {expected} were expected; write it again.")

    def verify(self) -> TrajectoryStore:
        """This store, once all its files have been read and have the SHA-256 of what was written; UserError names one
        that was changed. Once is enough: a phase does so before it trains on a dataset."""
        if not self._verified:
            for name, file in self._files.items():
                if not file.exists():
                    raise UserError(f"{self.path} was replaced by another store while it was open; open it again.")
                check_file(file, self.meta["listed"][name])
        self._verified = True
        return self

    def digest(self) -> str:
        """SHA-256 of the files' own, as the header lists them; of what they hold where it does not."""
        if "listed" not in self.meta:
            return super().digest()
        listed = {name: entry["sha256"] for name, entry in self.meta["listed"].items()}
        return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()

    def check_versions(self, here: Mapping[str, str]) -> None:
        """Warns if ``meta["versions"]`` names other versions of packages than those here, by name."""
        check_versions(self.path, self.meta.get("versions", {}), here)

    @staticmethod
    def once(path: Path, make: Callable[[], TrajectoryStore]) -> TrajectoryStore:
        """The store in a folder, verified; where there is none ``make`` writes it, and other processes wait for it."""
        if not (path / HEADER).is_file():
            with locked(path, wait=True):
                if not (path / HEADER).is_file():
                    return make()
        return TrajectoryStore(path).verify()

    @staticmethod
    def write(path: str | Path, trajectories: Trajectories, meta: Mapping[str, Any] | None = None) -> TrajectoryStore:
        """Writes the episodes; an existing store is replaced only once the new one is complete, and at no instant is
        there none. Other files in its folder stay. One writer waits for another.

        meta: JSON values to keep beside them. UserError for a folder that is neither empty nor a store.
        """
        check("trajectories", trajectories, Trajectories)
        return TrajectoryStore.join(path, [Episodes.of(trajectories)], meta)

    @staticmethod
    def join(
        path: str | Path,
        parts: Iterable[Episodes],
        meta: Mapping[str, Any] | None = None,
        most: int | None = None,
        beside: Collection[str] = (),
    ) -> TrajectoryStore:
        """Writes the episodes of several parts one after the other, at most ``most`` of them; see ``write``.

        beside: names that may be in the folder, and stay there.
        """
        target = Path(path)
        parts = list(parts)
        if not parts:
            raise UserError("parts are empty; give the episodes of at least one.")
        try:
            json.dumps(dict(meta or {}))
        except (TypeError, ValueError) as error:
            raise UserError(f"meta is {shown(meta)} ({error}); expected values of JSON.") from error
        if (target.exists() or target.is_symlink()) and not target.is_dir():
            raise _not_ours(target)
        with _writing, locked(target, wait=True):
            _remove_replaced(target)
            _refuse_others(target, beside)
            with draft_folder(target / HEADER) as draft:
                header = _save_arrays(draft, parts, dict(meta or {}), most)
                _exchange(draft, header, target)
        return TrajectoryStore(target)


# -- the folder -------------------------------------------------------------------------------------------------------


def _refuse_others(target: Path, beside: Collection[str]) -> None:
    """UserError if the folder holds anything but a store, unless that is named ``beside``."""
    if (target / HEADER).is_file() and "format" in read_json(target / HEADER, infinite=True):
        return
    if any(entry.name not in beside and not left_behind(entry) for entry in target.iterdir()):
        raise _not_ours(target)


def _not_ours(target: Path) -> UserError:
    return UserError(f"{target} is not a trajectory store and is not replaced; choose another folder.")


def _exchange(draft: Path, header: dict[str, Any], target: Path) -> None:
    """Puts the arrays of a new store beside those of the old one, replaces the header, and removes the old arrays.

    A file's name is used once, so that who has read a header finds the arrays that it lists, or none.
    """
    old, new, first = _store_files(target), {}, not (target / HEADER).exists()
    for name in header["arrays"]:
        free = first and not (target / f"{name}.npy").exists()
        new[name] = f"{name}.npy" if free else f"{name}-{secrets.token_hex(8)}.npy"
    write_text(target / REPLACED, json.dumps({"files": [*old, *new.values()]}))
    for name, file in new.items():
        os.replace(draft / f"{name}.npy", target / file)
    plain = all(file == f"{name}.npy" for name, file in new.items())
    write_text(target / HEADER, json.dumps(seal(header if plain else {**header, "files": new})))
    _remove_replaced(target)


def _remove_replaced(target: Path) -> None:
    """Removes the files that a writer has noted, perhaps one that was killed, but for those of the store; no others:
    they are the user's."""
    if not (target / REPLACED).exists():
        return
    current, noted = _store_files(target), read_json(target / REPLACED).get("files")
    for file in noted if isinstance(noted, list) else ():
        if file not in current and _FILE.fullmatch(str(file)):
            (target / file).unlink(missing_ok=True)
    (target / REPLACED).unlink()


def _store_files(target: Path) -> set[str]:
    """The files of the store in a folder; none where there is no store that can be read."""
    if not (target / HEADER).exists():
        return set()
    with suppress(UserError):
        return set(_array_files(_read_header(target)).values())
    return set()


def _mark(folder: Path) -> tuple[int, int]:
    """What a header has that no other has had at this place."""
    found = (folder / HEADER).stat()
    return found.st_ino, found.st_mtime_ns


def _read_header(folder: Path) -> dict[str, Any]:
    """store.json; UserError for one of another format, that was changed, or with arrays that are none of ours."""
    path = folder / HEADER
    meta = read_json(path, infinite=True)  # bounds of spaces
    if meta.get("format") not in (1, STORE_FORMAT) or isinstance(meta["format"], bool):
        raise UserError(f"{path} has format {shown(meta.get('format'))}; this version reads 1 and {STORE_FORMAT}.")
    if meta["format"] == STORE_FORMAT or meta.keys() & {"listed", SEAL}:
        check_seal(path, meta)
    elif folder not in _said:
        _said.add(folder)
        print(f"metacontroller: {folder} has format 1: it is read unchecked.", file=sys.stderr, flush=True)
    names: Any = meta.get("arrays")
    files, listed = (meta.get(name, {}) for name in ("files", "listed"))
    known = {field.name for field in fields(Trajectories)}
    sound = isinstance(names, list) and {"states", "actions", "lengths"} <= set(map(str, names)) <= known
    if not sound or not isinstance(files, dict) or not all(_FILE.fullmatch(str(file)) for file in files.values()):
        raise UserError(f"{path} names arrays {shown(names)} in {shown(files)}; expected those of Trajectories.")
    complete = isinstance(listed, dict) and listed.keys() == set(names) and all(map(is_file_digest, listed.values()))
    if not complete and (meta["format"] == STORE_FORMAT or listed):
        raise UserError(f"{path} lists {shown(listed)}; expected the size and SHA-256 of every array.")
    return meta


def _array_files(meta: Mapping[str, Any]) -> dict[str, str]:
    """The file of each array."""
    return {name: meta.get("files", {}).get(name, f"{name}.npy") for name in meta["arrays"]}


def _open(path: Path) -> np.ndarray:
    """A memory-mapped array of numbers; UserError for a file that is none, or shorter than it says."""
    check_regular(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # numpy parses the header as Python does, and fails in as many ways
        raise UserError(f"{path} is no whole array ({error}); write the store again.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim < 1:
        raise UserError(f"{path} holds no array of numbers; write the store again.")
    return array


def _save_arrays(folder: Path, parts: list[Episodes], meta: dict[str, Any], most: int | None) -> dict[str, Any]:
    """Writes array after array, a part at a time; returns the header."""
    cuts: dict[str, list[np.ndarray]] = {name: [] for name in parts[0].arrays}
    left = sum(map(len, parts)) if most is None else most
    for part in parts:
        count = min(left, len(part))
        left -= count
        for name, pieces in cuts.items():
            pieces.append(part.arrays[name][: part.first_row(name, count)])
    needed = sum(piece.nbytes for pieces in cuts.values() for piece in pieces)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed", str(folder.parent))
    for name, pieces in cuts.items():
        _save_array(folder / f"{name}.npy", pieces)
    listed = {name: file_digest(folder / f"{name}.npy") for name in cuts}
    others = {name: value for name, value in meta.items() if name not in _OWN}
    return {"format": STORE_FORMAT, "arrays": list(cuts), "listed": listed, **others}


def _save_array(path: Path, pieces: list[np.ndarray]) -> None:
    """One array of several, one after the other. Written, not mapped: where a disk is full that is an error, and a
    mapped page is the end of the process."""
    shapes = {piece.shape[1:] for piece in pieces}
    if len(shapes) > 1:
        raise UserError(f"the parts have {path.stem} of the shapes {sorted(shapes)}; expected one shape.")
    dtype, shape = np.result_type(*(piece.dtype for piece in pieces)), (sum(map(len, pieces)), *shapes.pop())
    with path.open("wb") as file:
        descr = np.lib.format.dtype_to_descr(dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        for piece in pieces:
            rows = max(1, _PIECE // max(1, piece[:1].nbytes))
            for start in range(0, len(piece), rows):
                file.write(np.ascontiguousarray(piece[start : start + rows], dtype).data)
        file.flush()
        os.fsync(file.fileno())
