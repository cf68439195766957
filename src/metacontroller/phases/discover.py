"""Phase 2, discovery: a metacontroller learns to steer the frozen model with codes that it must pay for (eq. 3).

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t) - lambda log p(o_{t+1} | ...) + alpha KL_t

Metrics, means over the log interval: ``loss``, ``action_loss`` (steered) and ``kl`` in nats per step, ``alpha``,
``switches`` (sum of the soft gate over an episode, beyond the first step), ``codes`` (taken per episode where the gate
is thresholded, as when acting), and how the gate meets the subgoals that discovery never sees, on the training batches:
``gate_recall``, ``gate_precision``, ``gate_binary_fraction``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metacontroller.control.discovery import DiscoveryNoise
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.batching import Augment, Generate
from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.errors import UserError
from metacontroller.metrics.gate import codes_taken, gate_alignment
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.diagnostics import diagnose, measure
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.loop import Drawn, train
from metacontroller.training.optimizer import OptimizerConfig, linear_warmup
from metacontroller.training.seeding import noise_generator


@dataclass(frozen=True, kw_only=True)
class DiscoverConfig:
    """Phase 2 (eq. 3)."""

    optimizer: OptimizerConfig
    """How long and how fast."""
    alpha: float = 0.3
    """Weight of the codes' KL after the linear warm-up; large from the first step, it collapses them to the prior."""
    alpha_start: float = 0.015
    """Weight of the KL before the linear warm-up."""
    alpha_warmup: tuple[int, int] = (0, 0)
    """Updates (from, to) between which the weight goes linearly from alpha_start to alpha."""
    state_loss_weight: float = 0.0
    """lambda, weight of predicting the next observation beside the next action."""
    train_model: bool = False
    """Train the action model along, a baseline (Fig. 7, 8)."""
    symmetry_augmentation: bool = False
    """Show the sequence embedder each episode under a symmetry of the world, drawn anew (our choice); else as it is."""
    seed: int = 0
    """Seed of the episodes and, apart, of the noise in codes and gate; a run derives it from its own seed."""

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.alpha_start < 0:
            raise UserError(f"alpha is {self.alpha} and alpha_start {self.alpha_start}; expected at least 0.")
        if not 0 <= self.alpha_warmup[0] <= self.alpha_warmup[1]:
            raise UserError(f"alpha_warmup is {self.alpha_warmup}; expected (from, to) with 0 <= from <= to.")

    def alpha_at(self, step: int) -> float:
        """KL weight of update number ``step``, counted from 0."""
        return self.alpha_start + (self.alpha - self.alpha_start) * linear_warmup(step, self.alpha_warmup)


def discover(
    config: DiscoverConfig,
    model: SteerableModel,
    meta_controller: MetaController,
    generate: Generate,
    run: RunFolder,
    *,
    augment: Augment | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Trains ``meta_controller`` in place on a frozen ``model``; writes ``meta_controller.safetensors`` to the run.

    With ``config.train_model`` the model is trained in place too, and written to ``cotrained_model.safetensors``.
    augment: how the sequence embedder sees each batch of states, drawn anew: a symmetry of the world under which
    subgoals stay what they are. Codes can then say only what survives it. None: as they are, as in the paper.
    At the end one held-out batch is judged (`phases.diagnostics`): analyses/diagnostics.json holds what was measured
    and the warnings, which are also printed to standard error unless ``quiet``.
    Without ``resume`` ValueError if the run holds a checkpoint of this phase.
    """
    model.eval()

    def draw(batch: Trajectories, generator: torch.Generator) -> Drawn:
        noise = meta_controller.draw_noise(batch.batch, batch.steps, generator)
        seen = {} if augment is None else {"embedded_states": augment(batch.states, generator)}
        return {**noise._asdict(), **seen}

    def loss_function(batch: Trajectories, step: int, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        alpha = config.alpha_at(step)
        losses, output = meta_controller.steered_losses(
            model,
            batch.states,
            batch.actions,
            batch.lengths,
            with_state_loss=config.state_loss_weight > 0,
            noise=DiscoveryNoise(drawn["code"], drawn["gate"]),
            embedded_states=drawn.get("embedded_states"),
            train_model=config.train_model,
        )
        kl = meta_controller.kl_loss(output)
        loss = losses.action + config.state_loss_weight * losses.state + alpha * kl
        loss = loss + meta_controller.auxiliary_ratio_loss(output)
        metrics = {"action_loss": losses.action, "kl": kl, "alpha": kl.new_full((), alpha)}
        with torch.no_grad():
            metrics["switches"] = masked_mean(output.gate, output.mask) * batch.lengths.float().mean() - 1
            codes = codes_taken(output.beta, batch.lengths, threshold=meta_controller.gate_config.threshold)
            metrics["codes"] = codes.to(output.beta.dtype).mean()
            if batch.segments is not None:
                metrics |= gate_alignment(output.beta, batch.segments, batch.lengths)
        return loss, metrics

    trained, parameters = meta_controller, meta_controller.discovery_parameters()
    if config.train_model:
        trained = nn.ModuleDict({"model": model, "meta_controller": meta_controller})
        parameters = [*model.parameters(), *parameters]
    train(
        "discover",
        config.optimizer,
        trained,
        parameters,
        generate,
        loss_function,
        run,
        seed=config.seed,
        draw=draw,
        resume=resume,
        quiet=quiet,
    )
    if processes(next(model.parameters()).device.type).is_main:
        if config.train_model:
            model.save(run.path / "cotrained_model.safetensors")
        meta_controller.save(run.path / "meta_controller.safetensors")
        for warning in write_diagnostics(config, model, meta_controller, generate, run):
            if not quiet:
                print(f"discover: warning: {warning}", file=sys.stderr, flush=True)
    return meta_controller


def write_diagnostics(
    config: DiscoverConfig, model: SteerableModel, meta_controller: MetaController, generate: Generate, run: RunFolder
) -> list[str]:
    """Judges one held-out batch, writes analyses/diagnostics.json and returns the warnings.

    The batch comes from a generator of its own, whose seed is not that of any episodes trained on.
    """
    device = next(model.parameters()).device
    generator = noise_generator(config.seed, device)
    batch = generate(config.optimizer.batch_size, generator).to(device)
    measured = measure(model, meta_controller, batch, generator)
    warnings = diagnose(**measured)
    run.write_analysis("diagnostics", {**measured, "warnings": warnings})
    return warnings
