"""Linear probes: how well does the residual after each block tell which subgoal the expert pursues (Fig. 3, A1)?

Axes: b episodes, t steps, n_e residual, l layers (0 is the input embedding), g subgoals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, EpisodesConfig, Results, TableRows, analysis
from metacontroller.data.batching import EpisodeStream, Generate
from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.errors import UserError
from metacontroller.models.protocol import SteerableModel
from metacontroller.ranges import Count, Positive, Rows
from metacontroller.report.analysis_figures import probes_figure
from metacontroller.storage.training_state import module_tensors
from metacontroller.training.progress import track
from metacontroller.training.seeding import noise_generator

Trained = TypeVar("Trained", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class LayerConfig(EpisodesConfig):
    """How something small is trained at every layer of a run's base model, and judged."""

    steps: Count = 1000
    """Updates."""
    batch_size: Rows = 128
    """Episodes an update."""
    lr: Positive = 3e-3
    """Learning rate."""

    def training(self) -> Results:
        """What results say of it."""
        return {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr}


def trained_on_labels(
    make: Callable[[], Trained],
    loss: Callable[[Trained, Trajectories], Tensor],
    generate: Generate,
    config: LayerConfig,
    seed: int,
    device: torch.device,
    update: Callable[[int, float], None],
) -> Trained:
    """What ``make`` returns, trained by AdamW to lower a loss of labelled episodes. update: told steps and losses."""
    stream = EpisodeStream(generate, config.batch_size, seed, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make().to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, fused=True)
    for step in range(1, config.steps + 1):
        value = loss(module, stream.next())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 50 == 0 or step == config.steps:
            update(step, float(value.detach()))
    return module


def labelled(batch: Trajectories) -> tuple[Tensor, Tensor]:
    """The subgoal of each step, (b, t), 0 in the padding, and which steps are real."""
    if batch.subgoals is None:
        raise UserError("the episodes carry no subgoals; give a source that labels them.")
    return batch.subgoals.clamp(min=0), batch.mask()


def layer_rows(results: Sequence[Results]) -> TableRows:
    """Lines of a table: each list entry by entry, as one of layers, then the single numbers."""
    rows: TableRows = []
    for name, value in results[0].items():
        if isinstance(value, list):
            layers = range(len(value))
            rows += [(f"{name}, layer {layer}", [result[name][layer] for result in results]) for layer in layers]
        elif isinstance(value, int | float):
            rows.append((name, [result[name] for result in results]))
    return rows


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
    sources: tuple[Generate, Generate],
    config: LayerConfig,
    *,
    subgoals: int,
    seed: int,
    controlled_only: bool = False,
    quiet: bool = False,
) -> ProbeResult:
    """Trains one linear map a layer on labelled episodes of the first source, judges it on episodes of the second.

    The model is frozen. subgoals: how many there are. controlled_only: at the controlled layer alone. The paper's
    training: 8k steps, batches of 512, a learning rate of 1e-3.
    """
    device = next(model.parameters()).device
    model.eval()
    layers = 1 if controlled_only else model.depth + 1

    def logits(probes: nn.ModuleList, batch: Trajectories) -> list[Tensor]:
        """(b, t, g) of each layer."""
        with torch.no_grad():
            read = model.residual if controlled_only else model.residuals
            residuals = read(batch.states, batch.actions)
        residuals = [residuals] if isinstance(residuals, Tensor) else residuals
        return [probe(residual) for probe, residual in zip(probes, residuals, strict=True)]

    def loss(probes: nn.ModuleList, batch: Trajectories) -> Tensor:
        labels, mask = labelled(batch)
        log_probs = [F.log_softmax(x, -1).gather(-1, labels[..., None])[..., 0] for x in logits(probes, batch)]
        return torch.stack([masked_mean(-log_prob, mask) for log_prob in log_probs]).sum()

    def make() -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(model.dim, subgoals) for _ in range(layers))

    with track(config.steps, "probe", quiet=quiet) as progress:

        def update(step: int, loss: float) -> None:
            progress.update(step, loss=loss / layers)

        probes = trained_on_labels(make, loss, sources[0], config, seed, device, update)
    held_out = sources[1](config.episodes, noise_generator(seed, device))
    labels, mask = labelled(held_out)
    assert held_out.segments is not None
    first = mask & (held_out.segments == 0)
    with torch.no_grad():
        right = [(values.argmax(-1) == labels).float() for values in logits(probes, held_out)]
    return ProbeResult(
        accuracy=[float(masked_mean(value, mask)) for value in right],
        at_start=[float(masked_mean(value, first)) for value in right],
        majority=float(torch.bincount(labels[mask]).max() / mask.sum()),
        probes=probes,
    )


@analysis("probes", command="probe", figure="3, A1")
class Probes(Analysis):
    """Linear probes of the subgoal at every layer of the base model and of its snapshots (Fig. 3, A1).

    The probes of the base model are kept in probes.safetensors.
    """

    Config = LayerConfig

    def measure(self, run: LoadedRun, config: LayerConfig, *, quiet: bool = False) -> Results:
        def probed(model: SteerableModel) -> ProbeResult:
            options = {"subgoals": len(run.subgoals), "seed": run.analysis_seed, "quiet": quiet}
            return probe_layers(model.to(run.device), run.labelled_sources, config, **options)

        snapshots = {step: model for step in run.snapshots if (model := run.snapshot(step)) is not None}
        models = {0: run.new_model(), **snapshots} if snapshots else {}
        over_training = {step: probed(model).accuracy for step, model in models.items()}
        final = probed(run.base)
        run.folder.save_checkpoint("probes", module_tensors("probes", final.probes), {"step": config.steps})
        results: Results = {"accuracy": final.accuracy, "at_start": final.at_start, "majority": final.majority}
        if over_training:
            over_training[run.pretraining_steps] = final.accuracy
            results["over_training"] = {"steps": list(over_training), "accuracy": list(over_training.values())}
        return {**results, **config.training()}

    def draw(self, results: Sequence[Results]) -> Any:
        return probes_figure(results)

    def rows(self, results: Sequence[Results]) -> TableRows:
        return layer_rows(results)
