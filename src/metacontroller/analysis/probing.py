"""Linear probes: how well does the residual after each block tell which subgoal the expert pursues (Fig. 3, A1)?

Axes: b episodes, t steps, n_e residual, l layers (0 is the input embedding), g subgoals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, Results, Rows, analysis
from metacontroller.data.batching import EpisodeStream, Generate
from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.protocol import SteerableModel
from metacontroller.ranges import COUNT, POSITIVE, ROWS, check_fields
from metacontroller.report.analysis_figures import probes_figure
from metacontroller.storage.training_state import module_tensors
from metacontroller.training.progress import track
from metacontroller.training.seeding import noise_generator, stream_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ProbeResult(NamedTuple):
    """accuracy: of each layer's probe, on held-out episodes, over all steps. at_start: over steps of first segments
    alone, where nothing but the way the expert goes can tell. majority: share of the commonest subgoal. probes: the
    trained linear maps, one a layer."""

    accuracy: list[float]
    at_start: list[float]
    majority: float
    probes: nn.ModuleList


def probe_layers(
    model: SteerableModel,
    generate: Generate,
    validation: Generate,
    *,
    subgoals: int,
    steps: int,
    batch_size: int,
    episodes: int,
    seed: int,
    lr: float = 1e-3,
    controlled_only: bool = False,
    quiet: bool = False,
) -> ProbeResult:
    """Trains one linear map a layer on labelled episodes of ``generate``, judges it on ``episodes`` of ``validation``.

    The model is frozen. subgoals: how many there are. steps, batch_size, lr: of AdamW (the paper: 8k, 512, 1e-3).
    controlled_only: at the controlled layer alone.
    """
    device = next(model.parameters()).device
    model.eval()
    stream = EpisodeStream(generate, batch_size, seed, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probes = nn.ModuleList(nn.Linear(model.dim, subgoals) for _ in range(1 if controlled_only else model.depth + 1))
    probes = probes.to(device)

    def read(batch: Trajectories) -> list[Tensor]:
        return _probed(model, probes, batch, controlled_only)

    optimizer = torch.optim.AdamW(probes.parameters(), lr=lr, fused=True)
    with track(steps, "probe", quiet=quiet) as progress:
        for step in range(steps):
            batch = stream.next()
            labels, mask = labelled(batch)
            loss = torch.stack([masked_mean(-_log_prob(x, labels), mask) for x in read(batch)]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                progress.update(step + 1, loss=float(loss.detach()) / len(probes))
    held_out = validation(episodes, noise_generator(seed, device))
    labels, mask = labelled(held_out)
    assert held_out.segments is not None
    first = mask & (held_out.segments == 0)
    with torch.no_grad():
        right = [(logits.argmax(-1) == labels).float() for logits in read(held_out)]
    return ProbeResult(
        accuracy=[float(masked_mean(value, mask)) for value in right],
        at_start=[float(masked_mean(value, first)) for value in right],
        majority=float(torch.bincount(labels[mask]).max() / mask.sum()),
        probes=probes,
    )


def labelled(batch: Trajectories) -> tuple[Tensor, Tensor]:
    """The subgoal of each step, (b, t), 0 in the padding, and which steps are real."""
    if batch.subgoals is None:
        raise UserError("the episodes carry no subgoals; give a source that labels them.")
    return batch.subgoals.clamp(min=0), batch.mask()


def _probed(model: SteerableModel, probes: nn.ModuleList, batch: Trajectories, controlled_only: bool) -> list[Tensor]:
    """Each layer's logits (b, t, g)."""
    with torch.no_grad():
        if controlled_only:
            residuals = [model.residual(batch.states, batch.actions)]
        else:
            residuals = model.residuals(batch.states, batch.actions)
    return [probe(residual) for probe, residual in zip(probes, residuals, strict=True)]


def _log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    return F.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """How something small is trained at every layer of a run's base model, and judged."""

    steps: int = 1000
    """Updates."""
    batch_size: int = 128
    """Episodes an update."""
    lr: float = 3e-3
    """Learning rate."""
    episodes: int = 2048
    """Held-out episodes to judge by."""

    def __post_init__(self) -> None:
        check_fields(self, steps=COUNT, batch_size=ROWS, episodes=ROWS, lr=POSITIVE)


def layer_rows(results: Sequence[Results]) -> Rows:
    """Lines of a table: each list entry by entry, as one of layers, then the single numbers."""
    rows: Rows = []
    for name, value in results[0].items():
        if isinstance(value, list):
            rows += [
                (f"{name}, layer {layer}", [result[name][layer] for result in results]) for layer in range(len(value))
            ]
        elif isinstance(value, int | float):
            rows.append((name, [result[name] for result in results]))
    return rows


@analysis("probes", command="probe", figure="3, A1")
class Probes(Analysis):
    """Linear probes of the subgoal at every layer of the base model and of its snapshots (Fig. 3, A1).

    The probes of the base model are kept in probes.safetensors.
    """

    Config = LayerConfig

    def measure(self, run: LoadedRun, config: LayerConfig, *, quiet: bool = False) -> Results:
        training = {**vars(config), "seed": stream_seed(run.seed, "analyse"), "quiet": quiet}

        def probed(model: SteerableModel) -> ProbeResult:
            sources = run.demonstrations("discover"), run.demonstrations("validation")
            return probe_layers(model.to(run.device), *sources, subgoals=len(run.subgoals), **training)

        kept = {step: model for step in run.snapshots if (model := run.snapshot(step)) is not None}
        models = {0: run.new_model(), **kept} if kept else {}
        over_training = {step: probed(model).accuracy for step, model in models.items()}
        final = probed(run.base)
        run.folder.save_checkpoint("probes", module_tensors("probes", final.probes), {"step": config.steps})
        results: Results = {"accuracy": final.accuracy, "at_start": final.at_start, "majority": final.majority}
        if over_training:
            over_training[run.pretraining_steps] = final.accuracy
            results["over_training"] = {"steps": list(over_training), "accuracy": list(over_training.values())}
        return {**results, "steps": config.steps, "batch_size": config.batch_size, "lr": config.lr}

    def draw(self, results: Sequence[Results]) -> Figure:
        return probes_figure(results)

    def rows(self, results: Sequence[Results]) -> Rows:
        return layer_rows(results)
