"""Held-out episodes of experts, step by step, for the figure of the gate and the report's player (Fig. 6).

Axes: b episodes, t steps, n_z code, g subgoals.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metacontroller.analysis.gate_alignment import held_out_gate
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, EpisodesConfig, Results, TableRows, analysis
from metacontroller.analysis.video import drawn
from metacontroller.data.trajectories import Trajectories
from metacontroller.domains.base import Domain
from metacontroller.errors import UserError
from metacontroller.metrics.switch_alignment import subgoal_changes
from metacontroller.ranges import Rows
from metacontroller.report.figures import gate_figure
from metacontroller.training.progress import announce

MAX_PICTURES = 400
"""Pictures of all episodes together; more steps than that are shown at every second, third, ... alone."""

MAX_BYTES = 900_000
"""Of all pictures together; they are drawn smaller until they fit."""

ARROW = " → "


@analysis("episodes", command="episodes", figure="6", needs_labels=False, file="gate")
class Episodes(Analysis):
    """Held-out episodes of experts with gate, codes and pictures, for the report's player (Fig. 6)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(EpisodesConfig):
        """How much is shown."""

        episodes: Rows = 8
        """Held-out episodes."""

    @torch.no_grad()
    def measure(self, run: LoadedRun, config: Config, *, quiet: bool = False) -> Results:
        """names: of the subgoals. every: steps from one picture to the next. episodes: each with lists that have an
        entry a step: gate, code in the two main axes of all, subgoals (the true ones, by index), belief (the probe's, a
        share for each subgoal); changes, the steps at which a new subgoal begins, the first apart; frames, pictures as
        data URIs; and task, as text. What there is none of is None."""
        gate = held_out_gate(run, config.episodes, run.analysis_seed)
        held_out, lengths, names = gate.episodes, gate.episodes.lengths.tolist(), run.subgoals
        changes = None if held_out.segments is None else subgoal_changes(held_out.segments, held_out.lengths)
        every = -(-sum(lengths) // MAX_PICTURES)
        frames = _frames(run.domain, held_out, every)
        by_step = {"gate": gate.beta, "code": main_axes(gate.code, held_out.mask()), "belief": _belief(run, held_out)}
        episodes = []
        for row, length in enumerate(lengths):
            subgoals = None if held_out.subgoals is None else held_out.subgoals[row, :length].tolist()
            numbers = {
                name: None if values is None else _rounded(values[row, :length]) for name, values in by_step.items()
            }
            task = "" if subgoals is None else ARROW.join(names[subgoal] for subgoal, _ in groupby(subgoals))
            begun = None if changes is None else changes[row].nonzero().flatten().tolist()
            episodes.append({"task": task, "subgoals": subgoals, "changes": begun, **numbers, "frames": frames[row]})
        return {"names": list(names), "every": every, "episodes": episodes}

    def draw(self, results: Sequence[Results]) -> Any:
        return gate_figure(results[0])

    def rows(self, results: Sequence[Results]) -> TableRows:
        episodes = [result["episodes"] for result in results]
        counts = [("episodes", [len(each) for each in episodes])]
        for name, part in (("steps", "gate"), ("pictures", "frames")):
            counts.append((name, [sum(len(episode[part] or []) for episode in each) for each in episodes]))
        return counts


def main_axes(z: Tensor, mask: Tensor) -> Tensor:
    """Codes (b, t, n_z) in the two directions in which those of real steps vary most, (b, t, 2)."""
    center = z[mask].mean(0)
    axes = torch.linalg.svd(z[mask] - center, full_matrices=False).Vh[:2]
    flat = (z - center) @ axes.T
    return nn.functional.pad(flat, (0, 2 - flat.shape[-1]))


def _belief(run: LoadedRun, batch: Trajectories) -> Tensor | None:
    """(b, t, g): what the base model's probe at the controlled layer makes of each step; None without probes."""
    if not run.folder.has_checkpoint("probes"):
        return None
    tensors, _ = run.folder.load_checkpoint("probes", batch.states.device)
    model = run.base.eval()
    residual = model.residual(batch.states, batch.actions)
    distances = [float((layer - residual).abs().max()) for layer in model.residuals(batch.states, batch.actions)]
    layer = distances.index(min(distances))  # the controlled one, whatever the model
    weight, bias = tensors[f"probes.{layer}.weight"], tensors[f"probes.{layer}.bias"]
    return nn.functional.linear(residual, weight, bias).softmax(-1)


def _rounded(values: Tensor) -> Any:
    """Nested lists of numbers with four decimals: the file should stay small."""
    return (values.double() * 1e4).round().div(1e4).tolist()


def _frames(domain: Domain, batch: Trajectories, every: int) -> Sequence[list[str] | None]:
    """Every so many states of each episode as data URIs, small enough together; None without pictures."""
    pictures: list[np.ndarray] = []
    try:
        if domain.offers("render"):
            episodes = zip(batch.states, batch.lengths.tolist(), strict=True)
            pictures = [drawn(domain, states[: length + 1 : every]) for states, length in episodes]
    except UserError as error:
        announce(f"episodes: no pictures: {error}")
    if not pictures:
        return [None] * batch.batch
    files: list[list[bytes]] = []
    for shrink in range(1, 33):
        files = [[png(picture[::shrink, ::shrink]) for picture in episode] for episode in pictures]
        if sum(map(len, chain.from_iterable(files))) <= MAX_BYTES:
            break
    return [["data:image/png;base64," + base64.b64encode(file).decode() for file in episode] for episode in files]


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 (height, width, 3), as a PNG file."""
    height, width, _ = picture.shape
    rows = picture.reshape(height, 3 * width)
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    lines = np.concatenate([np.full((height, 1), 2, np.uint8), rows - above], 1)  # filter 2: less the row above
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
