"""Phase 1, pretraining: an autoregressive model of the experts' actions (paper §1).

    loss = mean over real steps of  -log p(a_t | o_1:t) - lambda log p(o_{t+1} | o_1:t)

With clips (`objectives.clips`, our choice) the same loss of their steps is added.
Metrics: ``loss``, ``action_loss``, with lambda > 0 ``state_loss``, and with clips ``clip_loss``, the action loss of
their steps; all in nats per step. ``val_action_loss``, if episodes for validation are given: `training.validation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metacontroller.arguments import checked_kinds
from metacontroller.data.batching import Generate
from metacontroller.data.trajectories import Trajectories
from metacontroller.errors import UserError
from metacontroller.models.protocol import BehaviorCloningLosses, SteerableModel
from metacontroller.models.readouts import emphasized_choices
from metacontroller.objectives.clips import Decisions, clip_extras, clips_of, draw_clips
from metacontroller.phases.artefacts import BASE_MODEL, save_artefacts
from metacontroller.ranges import Count, NotNegative, Positive, RowsOr0, Seed, check_fields
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.loop import BatchExtras, train
from metacontroller.training.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Phase 1. UserError for values out of range."""

    optimizer: OptimizerConfig
    """How long and how fast."""
    state_loss_weight: NotNegative = 0.0
    """lambda, weight of the loss of the next observation."""
    choice_weight: Positive = 1.0
    """Weight, in the gradient, of the choice between the modes of a mixture over continuous actions (our choice)."""
    muon_lr: NotNegative = 0.0
    """Learning rate of Muon for the matrices of the blocks (our choice); 0: AdamW for all, as in the paper. It falls as
    the optimizer's does, and weight decay is the same."""
    clips: RowsOr0 = 0
    """Clips beside each episode of a batch, which begin where experts decide, see `objectives.clips` (our choice)."""
    clip_steps: Count = 3
    """Steps of a clip."""
    snapshots: tuple[Count, ...] = ()
    """Updates after which the model is saved, for analyses over training."""
    seed: Seed = 0
    """Seed of the episodes; a run derives it from its own seed."""

    def __post_init__(self) -> None:
        check_fields(self)


@checked_kinds
def pretrain(
    config: PretrainConfig,
    model: SteerableModel,
    generate: Generate,
    run: RunFolder,
    *,
    decisions: Decisions | None = None,
    validation: Generate | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> SteerableModel:
    """Trains ``model`` in place on episodes from ``generate``.

    Writes ``base_model.safetensors`` and the snapshots (`snapshot_path`). decisions: see `Domain.decisions`, for clips.
    validation: as of `train`. UserError without decisions, and if a checkpoint of this phase is there and not resumed.
    """
    if config.clips and decisions is None:
        raise UserError(f"clips is {config.clips}, but no decisions are given; expected 0.")
    weight, workers = config.state_loss_weight, processes(next(model.parameters()).device.type)

    def save_snapshot(step: int) -> None:
        if workers.is_main and step in config.snapshots:
            snapshot_path(run, step).parent.mkdir(parents=True, exist_ok=True)
            model.save(snapshot_path(run, step))

    def prepare(batch: Trajectories, step: int, generator: torch.Generator) -> BatchExtras:
        if not config.clips or decisions is None:
            return {}
        count = config.clips * batch.batch
        return clip_extras(draw_clips(generate, decisions, count, config.clip_steps, generator), batch)

    def loss_of(batch: Trajectories, step: int, extras: BatchExtras) -> tuple[Tensor, dict[str, Tensor]]:
        loss, losses = _imitation(model, batch, weight, checked=step > 0)
        metrics = {"action_loss": losses.action, **({"state_loss": losses.state} if weight > 0 else {})}
        if config.clips:
            clips, factor = clips_of(extras, batch)
            loss_of_clips, losses = _imitation(model, clips, weight, checked=True)
            loss, metrics["clip_loss"] = loss + factor * loss_of_clips, factor * losses.action
        return loss, metrics

    with emphasized_choices(model.action_readout, config.choice_weight):
        train(
            "pretrain",
            config.optimizer,
            model,
            list(model.parameters()),
            generate,
            loss_of,
            run,
            seed=config.seed,
            matrices=model.matrices(),
            muon_lr=config.muon_lr,
            sample_extras=prepare,
            validation=validation,
            after=save_snapshot,
            resume=resume,
            quiet=quiet,
        )
    save_artefacts(run, workers, {BASE_MODEL: model})
    return model


def _imitation(
    model: SteerableModel, episodes: Trajectories, weight: float, *, checked: bool
) -> tuple[Tensor, BehaviorCloningLosses]:
    """The loss of episodes, with the state loss at this weight, and its parts; checked: whether they have been."""
    batch = episodes.states, episodes.actions, episodes.lengths
    losses = model.behavior_cloning_loss(*batch, with_state_loss=weight > 0, checked=checked)
    return losses.action + weight * losses.state, losses


@checked_kinds
def snapshot_path(run: RunFolder, step: int) -> Path:
    """The file of the model after ``step`` updates."""
    return run.within(f"snapshots/{BASE_MODEL}-{step}.safetensors")
