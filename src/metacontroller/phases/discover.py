"""Phase 2, discovery: a metacontroller learns to steer the frozen model with codes, at a cost of alpha KL (eq. 3).

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t) - lambda log p(o_{t+1} | ...) + alpha KL_t

Metrics, means over the log interval: ``loss``, ``action_loss`` (steered) and ``kl`` in nats per step, ``alpha``,
``switches`` (sum of the soft gate over an episode, without the first step), ``codes`` (per episode, where the gate is
thresholded, as when acting), and the alignment of the gate with the subgoals' labels, which discovery never sees, on
the training batches: ``gate_recall``, ``gate_precision``, ``gate_binary_fraction``. In guided updates the gate is that
after the named codes. ``val_action_loss``, if episodes for validation are given: `training.validation`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metacontroller.arguments import checked_kinds
from metacontroller.control.core import DiscoveryNoise
from metacontroller.control.discovery_losses import auxiliary_ratio_loss, hard_switches, kl_loss, steered_losses
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.parameter_groups import fixed_gate, matrices
from metacontroller.data.batching import Augment, Generate, apart
from metacontroller.data.trajectories import Ratio, Trajectories
from metacontroller.errors import UserError
from metacontroller.metrics.switch_alignment import codes_taken, gate_sums, later_steps
from metacontroller.models.protocol import SteerableModel
from metacontroller.models.readouts import emphasized_choices
from metacontroller.objectives.clips import Decisions, draw_clips
from metacontroller.objectives.guided import Guide, Positions
from metacontroller.phases.artefacts import COTRAINED_MODEL, META_CONTROLLER, save_artefacts
from metacontroller.phases.diagnostics import diagnose, measure
from metacontroller.ranges import COUNT, MOST_ROWS, NOT_NEGATIVE, POSITIVE, SEED, Whole, check_fields, check_warmup
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.evaluation_mode import evaluation_mode
from metacontroller.training.loop import BatchExtras, train
from metacontroller.training.optimizer import OptimizerConfig, linear_warmup
from metacontroller.training.seeding import noise_generator


@dataclass(frozen=True, kw_only=True)
class DiscoverConfig:
    """Phase 2 (eq. 3). UserError for values out of range."""

    optimizer: OptimizerConfig
    """How long and how fast."""
    alpha: float = 0.3
    """Weight of the codes' KL after the linear warm-up; a large weight from the start collapses them to the prior."""
    alpha_start: float = 0.015
    """Weight of the KL before the linear warm-up."""
    alpha_warmup: tuple[int, int] = (0, 0)
    """Updates (from, to) between which the weight goes linearly from alpha_start to alpha."""
    state_loss_weight: float = 0.0
    """lambda, weight of the loss of the next observation."""
    choice_weight: float = 1.0
    """Weight, in the gradient, of the choice between the modes of a mixture over continuous actions (our choice)."""
    muon_lr: float = 0.0
    """Learning rate of Muon for the metacontroller's matrices (our choice); 0: AdamW for all, as in the paper."""
    guided_updates: int = 0
    """Updates at the start in which codes are those that `objectives.guided` names; the gate, and the norm and history
    that it reads, then stay as they are. 0: none, as in the paper."""
    clips: int = 0
    """Clips beside each episode of a batch in guided updates, from where experts decide, see `objectives.clips`."""
    clip_steps: int = 3
    """Steps of a clip."""
    train_model: bool = False
    """Train the action model too: co-training, a baseline (Fig. 7, 8)."""
    symmetry_augmentation: bool = False
    """Apply a random symmetry of the world to the episodes that the sequence embedder reads (our choice)."""
    seed: int = 0
    """Seed of the episodes and, in a separate stream, of the noise in codes and gate; derived from the run's seed."""

    def __post_init__(self) -> None:
        check_fields(self, alpha=NOT_NEGATIVE, alpha_start=NOT_NEGATIVE, state_loss_weight=NOT_NEGATIVE, seed=SEED)
        check_fields(self, choice_weight=POSITIVE, muon_lr=NOT_NEGATIVE)
        check_fields(self, guided_updates=Whole(0, self.optimizer.steps))
        check_fields(self, clips=Whole(0, MOST_ROWS), clip_steps=COUNT)
        check_warmup("alpha_warmup", self.alpha_warmup)

    def alpha_at(self, step: int) -> float:
        """Weight of the codes' KL at update number ``step``, counted from 0."""
        return self.alpha_start + (self.alpha - self.alpha_start) * linear_warmup(step, self.alpha_warmup)


@checked_kinds
def discover(
    config: DiscoverConfig,
    model: SteerableModel,
    meta_controller: MetaController,
    generate: Generate,
    run: RunFolder,
    *,
    augment: Augment | None = None,
    positions: Positions | None = None,
    decisions: Decisions | None = None,
    validation: Generate | None = None,
    gate_tolerance: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Trains ``meta_controller`` in place on a frozen ``model``; writes ``meta_controller.safetensors`` to the run.

    With ``config.train_model`` the model is trained in place too, and written to ``cotrained_model.safetensors``.
    augment: symmetry augmentation of the states that the sequence embedder reads, random for each batch. It must leave
    subgoals unchanged; codes can then carry only what is invariant under it. None (the paper): no augmentation.
    positions: for ``config.guided_updates``, where things are in an observation, see `Domain.positions`. decisions: for
    ``config.clips``, see `Domain.decisions`. gate_tolerance: steps within which the metrics take a switch and a change
    of subgoal as the same.
    validation: as of `training.loop.train`. At the end, gate and codes are checked on one batch of it
    (`phases.diagnostics`), or without it on one of ``generate`` from a stream apart: analyses/diagnostics.json holds
    the measurements and the warnings, which are also printed to standard error unless ``quiet``.
    UserError if the run holds a checkpoint of this phase and ``resume`` is false.
    """
    evaluation_mode(model)
    judged_by = (lambda n, generator: generate(n, apart(generator))) if validation is None else validation
    workers = processes(next(model.parameters()).device.type)
    guide = None
    if config.guided_updates:
        if positions is None:
            raise UserError(f"guided_updates is {config.guided_updates}, but no positions are given; expected 0.")
        guide = Guide(meta_controller, generate, positions, augment=augment, seed=config.seed)
    if config.clips and (guide is None or decisions is None):
        raise UserError(f"clips is {config.clips}, but updates are not guided or no decisions are given; expected 0.")

    def sample_extras(batch: Trajectories, step: int, generator: torch.Generator) -> BatchExtras:
        noise = meta_controller.sample_noise(batch.batch, batch.steps, generator)
        augmented = {} if augment is None else {"embedded_states": augment(batch.states, generator)}
        if guide is None or step >= config.guided_updates:
            return {**noise._asdict(), **augmented}
        named = guide.extras(batch)
        if config.clips and decisions is not None:
            drawn = draw_clips(generate, decisions, config.clips * batch.batch, config.clip_steps, generator)
            named |= guide.clip_extras(drawn, batch)
        return {**noise._asdict(), **augmented, **named}

    def loss_function(batch: Trajectories, step: int, extras: BatchExtras) -> tuple[Tensor, dict[str, Tensor | Ratio]]:
        alpha = config.alpha_at(step)
        guided = guide if step < config.guided_updates else None
        fixed = step >= config.guided_updates > 0  # free updates would open it where nothing begins (log 112, 113)
        with fixed_gate(meta_controller) if fixed else nullcontext():
            losses, output = steered_losses(
                meta_controller,
                model,
                batch.states,
                batch.actions,
                batch.lengths,
                with_state_loss=config.state_loss_weight > 0,
                noise=DiscoveryNoise(extras["code"], extras["gate"]),
                embedded_states=extras.get("embedded_states"),
                train_model=config.train_model,
                teacher_codes=None if guided is None else guided.teacher_codes(extras),
            )
        kl = kl_loss(output)
        loss = losses.action + config.state_loss_weight * losses.state
        if guided is not None:
            loss = loss + guided.loss(batch, extras, output)
            if config.clips:
                loss = loss + guided.clip_loss(model, batch, extras)
        else:
            loss = loss + alpha * kl
            if meta_controller.ratio_loss_weight > 0:
                switched = workers.mean(hard_switches(meta_controller, output))
                loss = loss + auxiliary_ratio_loss(meta_controller, output, switched)
        metrics: dict[str, Tensor | Ratio] = {"action_loss": losses.action, "kl": kl, "alpha": kl.new_full((), alpha)}
        with torch.no_grad():
            beta, lengths, episodes = output.beta, batch.lengths, batch.lengths.new_tensor(batch.batch)
            threshold = meta_controller.gate_config.threshold
            soft = output.gate.masked_fill(~later_steps(lengths, batch.steps), 0)
            codes = codes_taken(beta, lengths, threshold=threshold)
            metrics |= {"switches": Ratio(soft.sum(), episodes), "codes": Ratio(codes.sum(), episodes)}
            if batch.segments is not None:
                switches = {"threshold": threshold, "tolerance": gate_tolerance}
                metrics |= gate_sums(beta, batch.segments, lengths, **switches)
        return loss, metrics

    trained, parameters = meta_controller, meta_controller.discovery_parameters()
    if config.train_model:
        trained = nn.ModuleDict({"model": model, "meta_controller": meta_controller})
        parameters = [*model.parameters(), *parameters]
    with emphasized_choices(model.action_readout, config.choice_weight):
        train(
            "discover",
            config.optimizer,
            trained,
            parameters,
            generate,
            loss_function,
            run,
            seed=config.seed,
            matrices=matrices(meta_controller),
            muon_lr=config.muon_lr,
            sample_extras=sample_extras,
            validation=validation,
            resume=resume,
            quiet=quiet,
        )
    cotrained = {COTRAINED_MODEL: model} if config.train_model else {}
    save_artefacts(run, workers, {**cotrained, META_CONTROLLER: meta_controller})
    if workers.is_main:
        for warning in write_diagnostics(config, model, meta_controller, judged_by, run):
            if not quiet:
                print(f"discover: warning: {warning}", file=sys.stderr, flush=True)
    workers.wait()
    return meta_controller


def write_diagnostics(
    config: DiscoverConfig, model: SteerableModel, meta_controller: MetaController, validation: Generate, run: RunFolder
) -> list[str]:
    """Measures gate and codes on one validation batch, writes analyses/diagnostics.json and returns the warnings."""
    device = next(model.parameters()).device
    generator = noise_generator(config.seed, device)
    batch = validation(config.optimizer.batch_size, generator).to(device)
    measured = measure(model, meta_controller, batch, generator)
    warnings = diagnose(**measured)
    run.write_analysis("diagnostics", {**measured, "warnings": warnings})
    return warnings
