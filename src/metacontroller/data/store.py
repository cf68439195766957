"""Episodes on disk, memory-mapped."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metacontroller.data.trajectories import Trajectories, length_mask
from metacontroller.errors import UserError

STORE_FORMAT = 1


class TrajectoryStore:
    """Episodes on disk, memory-mapped: a folder of plain ``.npy`` arrays without padding and a ``store.json``.

    Loading runs no code: arrays are read with ``allow_pickle=False``. UserError if the folder is no store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = self.path / "store.json"
        if not header.is_file():
            raise UserError(f"{self.path} is not a trajectory store: it has no store.json; write one with `write`.")
        self.meta = json.loads(header.read_text())
        if self.meta.get("format") != STORE_FORMAT:
            raise UserError(f"{header} has format {self.meta.get('format')!r}; this version reads {STORE_FORMAT}.")
        self.arrays = {
            name: np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in self.meta["arrays"]
        }
        lengths = np.asarray(self.arrays["lengths"])
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.arrays["lengths"])

    def read(self, rows: np.ndarray | Tensor) -> Trajectories:
        """The episodes with indices ``rows`` (b,), padded to the longest; UserError for indices out of range."""
        index = np.asarray(rows)
        if index.ndim != 1 or not len(index) or not np.issubdtype(index.dtype, np.integer):
            raise UserError(f"rows have shape {index.shape} and dtype {index.dtype}; expected a list of whole numbers.")
        if index.min() < 0 or index.max() >= len(self):
            raise UserError(
                f"rows range over {index.min()}..{index.max()}; each must lie in 0..{len(self) - 1}, the episodes held."
            )
        lengths = np.asarray(self.arrays["lengths"])[index]
        values = {"lengths": torch.from_numpy(lengths.copy())}
        for name, array in self.arrays.items():
            if name == "lengths":
                continue
            extra = int(name == "states")
            first = self.starts[index] + (index if extra else 0)
            values[name] = torch.from_numpy(_gather_padded(array, first, lengths + extra, name))
        return Trajectories(**values)

    @staticmethod
    def write(path: str | Path, trajectories: Trajectories) -> TrajectoryStore:
        """Writes the episodes; an existing store is replaced only once the new one is complete."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            draft, retired = work / "draft", work / "retired"
            draft.mkdir()
            _save_arrays(draft, trajectories)
            if target.exists():
                os.replace(target, retired)
            os.replace(draft, target)
        finally:
            shutil.rmtree(work)
        return TrajectoryStore(target)


def _save_arrays(folder: Path, trajectories: Trajectories) -> None:
    """Writes the real steps of every array, episode after episode, and the header last."""
    steps = trajectories.mask().cpu()
    real = {"lengths": torch.ones_like(trajectories.lengths, dtype=torch.bool).cpu()}
    real["states"] = length_mask(trajectories.lengths.cpu() + 1, trajectories.steps + 1)
    names = [field.name for field in fields(trajectories) if getattr(trajectories, field.name) is not None]
    for name in names:
        values = getattr(trajectories, name).cpu()[real.get(name, steps)]
        np.save(folder / f"{name}.npy", values.numpy(), allow_pickle=False)
    (folder / "store.json").write_text(json.dumps({"format": STORE_FORMAT, "arrays": names}))


def _gather_padded(array: np.ndarray, first: np.ndarray, lengths: np.ndarray, name: str) -> np.ndarray:
    """(b, longest, ...) rows of ``array``; states repeat their last entry in the padding, labels are -1, actions 0."""
    offsets = np.arange(lengths.max())
    padded = array[first[:, None] + np.minimum(offsets, lengths[:, None] - 1)]
    if name != "states":
        padded[offsets >= lengths[:, None]] = -1 if name in ("subgoals", "segments") else 0
    return padded
