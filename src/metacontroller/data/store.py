"""Episodes side by side without padding: in memory, or on disk and memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metacontroller.data.trajectories import ENDINGS, PADDING, PER_EPISODE, Trajectories, length_mask
from metacontroller.errors import UserError
from metacontroller.storage.versions import warn_of_versions

STORE_FORMAT = 1


class Episodes:
    """Episodes of any lengths. arrays: the fields of `Trajectories` by name, episode after episode without padding."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)
        self.lengths = np.asarray(self.arrays["lengths"])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    @classmethod
    def of(cls, trajectories: Trajectories) -> Episodes:
        """The real steps of padded episodes."""
        return cls(_real_steps(trajectories))

    def __len__(self) -> int:
        return len(self.lengths)

    def read(
        self, rows: np.ndarray | Tensor, *, longest: int | None = None, rng: np.random.Generator | None = None
    ) -> Trajectories:
        """The episodes with indices ``rows`` (b,), padded to the longest; UserError for indices out of range.

        longest: of an episode of more steps only so many are read, from its start, or from a step that ``rng`` draws.
        """
        index = np.asarray(rows)
        if index.ndim != 1 or not len(index) or not np.issubdtype(index.dtype, np.integer):
            raise UserError(f"rows have shape {index.shape} and dtype {index.dtype}; expected a list of whole numbers.")
        if index.min() < 0 or index.max() >= len(self):
            raise UserError(
                f"rows range over {index.min()}..{index.max()}; each must lie in 0..{len(self) - 1}, the episodes held."
            )
        whole = self.lengths[index]
        lengths = whole if longest is None else np.minimum(whole, longest)
        skipped = np.zeros_like(whole) if rng is None else rng.integers(0, whole - lengths + 1)
        values = {"lengths": torch.from_numpy(lengths.copy())}
        for name, array in self.arrays.items():
            if name == "lengths":
                continue
            if name in PER_EPISODE:
                each = np.asarray(array)[index]  # a piece that stops before the end has not ended yet
                values[name] = torch.from_numpy(each & (skipped + lengths == whole) if name in ENDINGS else each)
                continue
            extra = int(name == "states")
            first = self.starts[index] + (index if extra else 0) + skipped
            values[name] = torch.from_numpy(_gather_padded(array, first, lengths + extra, name))
        return Trajectories(**values)


class TrajectoryStore(Episodes):
    """Episodes on disk, memory-mapped: a folder of plain ``.npy`` arrays without padding and a ``store.json``.

    Loading runs no code: arrays are read with ``allow_pickle=False``. meta: what store.json holds, with whatever
    ``write`` was given. UserError if the folder is no store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = self.path / "store.json"
        if not header.is_file():
            raise UserError(f"{self.path} is not a trajectory store: it has no store.json; write one with `write`.")
        self.meta = json.loads(header.read_text())
        if self.meta.get("format") != STORE_FORMAT:
            raise UserError(f"{header} has format {self.meta.get('format')!r}; this version reads {STORE_FORMAT}.")
        super().__init__(
            {
                name: np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in self.meta["arrays"]
            }
        )

    def check_versions(self, here: Mapping[str, str]) -> None:
        """Warns if ``meta["versions"]`` names other versions of packages than those here, by name."""
        warn_of_versions(self.path, self.meta.get("versions", {}), here)

    @staticmethod
    def write(path: str | Path, trajectories: Trajectories, meta: Mapping[str, Any] | None = None) -> TrajectoryStore:
        """Writes the episodes; an existing store is replaced only once the new one is complete.

        meta: JSON values to keep beside them.
        """
        return TrajectoryStore.join(path, [Episodes.of(trajectories)], meta)

    @staticmethod
    def join(
        path: str | Path, parts: Iterable[Episodes], meta: Mapping[str, Any] | None = None, most: int | None = None
    ) -> TrajectoryStore:
        """Writes the episodes of several parts one after the other, at most ``most`` of them; see ``write``."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            draft, retired = work / "draft", work / "retired"
            draft.mkdir()
            _save_arrays(draft, list(parts), dict(meta or {}), most)
            if target.exists():
                os.replace(target, retired)
            os.replace(draft, target)
        finally:
            shutil.rmtree(work)
        return TrajectoryStore(target)


def _real_steps(trajectories: Trajectories) -> dict[str, np.ndarray]:
    """The real steps of every array, episode after episode."""
    lengths = trajectories.lengths.cpu()
    steps, states = length_mask(lengths, trajectories.steps), length_mask(lengths + 1, trajectories.steps + 1)
    arrays = {}
    for field in fields(trajectories):
        value = getattr(trajectories, field.name)
        if value is not None:
            mask = ... if field.name in PER_EPISODE else states if field.name == "states" else steps
            arrays[field.name] = value.cpu()[mask].numpy()
    return arrays


def _save_arrays(folder: Path, parts: list[Episodes], meta: dict[str, Any], most: int | None) -> None:
    """Writes array after array, a part at a time, and the header last."""
    kept, left = [], most
    for part in parts:
        kept.append(len(part) if left is None else min(left, len(part)))
        left = None if left is None else left - kept[-1]
    for name, first in parts[0].arrays.items():
        cuts = []
        for part, count in zip(parts, kept, strict=True):
            steps = part.starts[count]
            cuts.append(part.arrays[name][: count if name in PER_EPISODE else steps + count * (name == "states")])
        shape = (sum(map(len, cuts)), *first.shape[1:])
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", first.dtype, shape)
        np.concatenate(cuts, out=array)
        array.flush()
    header = {"format": STORE_FORMAT, "arrays": list(parts[0].arrays), **meta}
    (folder / "store.json").write_text(json.dumps(header))


def _gather_padded(array: np.ndarray, first: np.ndarray, lengths: np.ndarray, name: str) -> np.ndarray:
    """(b, longest, ...) rows of ``array``; states repeat their last entry in the padding, labels are -1, the rest 0."""
    offsets = np.arange(lengths.max())
    padded = array[first[:, None] + np.minimum(offsets, lengths[:, None] - 1)]
    if name != "states":
        padded[offsets >= lengths[:, None]] = PADDING.get(name, 0)
    return padded
