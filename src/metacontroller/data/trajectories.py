"""Behaviour data: padded batches with lengths, length-sorted windows, a memory-mapped store.

Axes: b episodes, t steps. A sequence holds T actions and T + 1 states: ``o_1, a_1, ..., a_T, o_{T+1}`` (paper §1).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metacontroller.errors import UserError

STORE_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """A padded batch of episodes.

    states: (b, T + 1, ...) observations o_1 .. o_{T+1}; the padding repeats the last one.
    actions: (b, T, ...) actions a_1 .. a_T; zeros in the padding.
    lengths: (b,) int64, number of actions of each episode, 1 <= length <= T.
    subgoals: (b, T) int64 or None, which subgoal each action pursues (-1 in the padding).
    segments: (b, T) int64 or None, index of that subgoal in its task (-1 in the padding).
    Subgoals and segments are labels for evaluation only. The values of lengths are looked at only where they lie on the
    CPU: looking elsewhere would wait for the device.
    """

    states: Tensor
    actions: Tensor
    lengths: Tensor
    subgoals: Tensor | None = None
    segments: Tensor | None = None

    def __post_init__(self) -> None:
        batch, steps = self.actions.shape[:2]
        if batch == 0:
            raise UserError("Trajectories hold 0 episodes; give at least one.")
        if self.states.shape[:2] != (batch, steps + 1):
            raise UserError(
                f"states have shape {tuple(self.states.shape)} but actions of shape {tuple(self.actions.shape)} need "
                f"({batch}, {steps + 1}, ...): one state more than actions."
            )
        if self.lengths.shape != (batch,):
            raise UserError(f"lengths have shape {tuple(self.lengths.shape)}; expected ({batch},), one per episode.")
        check_lengths(self.lengths, batch, steps, "lengths", wait=False)

    @property
    def batch(self) -> int:
        """Number of episodes."""
        return self.actions.shape[0]

    @property
    def steps(self) -> int:
        """T, the padded number of actions."""
        return self.actions.shape[1]

    def mask(self) -> Tensor:
        """(b, T) bool: which actions are real."""
        return length_mask(self.lengths, self.steps)

    def index(self, rows: Tensor) -> Trajectories:
        """The episodes named by ``rows``, cut to the longest of them."""
        steps = int(self.lengths[rows].max())
        cut = {"states": steps + 1, "actions": steps, "subgoals": steps, "segments": steps}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        picked = {
            name: value[rows, : cut[name]] if name in cut else value[rows]
            for name, value in values.items()
            if value is not None
        }
        return replace(self, **picked)

    def to(self, device: torch.device | str) -> Trajectories:
        """The same episodes on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})


def length_mask(lengths: Tensor, steps: int) -> Tensor:
    """(b, steps) bool, true where the step index lies below the episode's length."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (b, t) where mask (b, t); padded entries may hold anything finite."""
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp_min(1)


def check_lengths(
    lengths: Tensor | None, batch: int, steps: int, name: str = "episode_lens", *, wait: bool = True
) -> None:
    """Raises ValueError unless ``lengths`` is None or holds ``batch`` whole numbers within 1..steps.

    With wait=False their values are looked at only where they lie on the CPU: elsewhere that would wait for the device.
    """
    if lengths is None:
        return
    if lengths.shape != (batch,) or lengths.dtype.is_floating_point:
        raise UserError(
            f"{name} has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; "
            f"expected ({batch},) whole numbers, one per episode."
        )
    if not wait and lengths.device.type != "cpu":
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 1 or high > steps:
        raise UserError(f"{name} ranges over {low}..{high}; each must lie in 1..{steps}, the padded length.")


def length_sorted_batches(
    trajectories: Trajectories, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[Trajectories]:
    """Batches of episodes of similar length, in random order, so that little of a batch is padding.

    Yields ``len // batch_size`` batches; episodes that do not fill a batch are left out, drawn afresh at each call.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected at least 1.")
    count = trajectories.batch // batch_size
    if count == 0:
        raise UserError(f"batch_size {batch_size} is larger than the {trajectories.batch} episodes at hand; lower it.")
    device = generator.device if generator is not None else torch.device("cpu")
    kept = torch.randperm(trajectories.batch, generator=generator, device=device)[: count * batch_size]
    lengths = trajectories.lengths.to(device)
    by_length = kept[torch.argsort(lengths[kept], stable=True)].view(count, batch_size)
    for index in torch.randperm(count, generator=generator, device=device).tolist():
        yield trajectories.index(by_length[index].to(trajectories.lengths.device))


class TrajectoryStore:
    """Episodes on disk, memory-mapped: a folder of plain ``.npy`` arrays without padding and a ``store.json``.

    Loading runs no code: arrays are read with ``allow_pickle=False``.
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
        """The episodes named by ``rows``, padded to the longest of them."""
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
        """Writes the episodes; an existing store is replaced only when the new one is whole."""
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
    """Writes the real steps of every array, end to end, and the header last."""
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
