"""Phase 2, discovery: a metacontroller learns to steer the frozen model with codes that it must pay for (eq. 3).

    loss = mean over real steps of  -log p(a_t | o_1:t, z_1:t) - lambda log p(o_{t+1} | ...) + alpha KL_t

Metrics, means over the log interval: ``loss``, ``action_loss`` (steered) and ``kl`` in nats per step, ``alpha``,
``switches`` (sum of the gate over an episode, beyond the first step), and how the gate meets the subgoals that
discovery never sees, on the training batches: ``gate_recall``, ``gate_precision``, ``gate_binary_fraction``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metacontroller.analysis.switching import gate_alignment
from metacontroller.control.metacontroller import DiscoveryNoise, MetaController
from metacontroller.data.trajectories import Trajectories, masked_mean
from metacontroller.models.transformer import Transformer
from metacontroller.phases.parallel import processes
from metacontroller.phases.training import Drawn, Generate, OptimizerConfig, risen, train
from metacontroller.run_folder import RunFolder

EmbeddedView = Callable[[Tensor, torch.Generator], Tensor]
"""states (b, t, ...) and a source of randomness -> states of the same shape."""


@dataclass(frozen=True, kw_only=True)
class DiscoverConfig:
    """alpha: weight of the KL (eq. 3), reached from ``alpha_start`` linearly between steps ``alpha_warmup`` (from, to);
    an alpha that is large from the first step collapses codes to the prior. state_loss_weight: lambda. train_model:
    whether the action model is trained along, a baseline (Fig. 7, 8). seed: of the episodes and, apart, of the noise in
    codes and gate."""

    optimizer: OptimizerConfig
    alpha: float = 0.3
    alpha_start: float = 0.015
    alpha_warmup: tuple[int, int] = (0, 0)
    state_loss_weight: float = 0.0
    train_model: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.alpha_start < 0:
            raise ValueError(f"alpha is {self.alpha} and alpha_start {self.alpha_start}; expected at least 0.")
        if not 0 <= self.alpha_warmup[0] <= self.alpha_warmup[1]:
            raise ValueError(f"alpha_warmup is {self.alpha_warmup}; expected (from, to) with 0 <= from <= to.")

    def alpha_at(self, step: int) -> float:
        """KL weight of update number ``step``, counted from 0."""
        return self.alpha_start + (self.alpha - self.alpha_start) * risen(step, self.alpha_warmup)


def discover(
    config: DiscoverConfig,
    model: Transformer,
    meta_controller: MetaController,
    generate: Generate,
    run: RunFolder,
    *,
    embedded_view: EmbeddedView | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Trains ``meta_controller`` in place on a frozen ``model``; writes ``meta_controller.safetensors`` to the run.

    With ``config.train_model`` the model is trained in place too, and written to ``cotrained_model.safetensors``.
    embedded_view: how the sequence embedder sees each batch of states, drawn anew: a symmetry of the world under which
    subgoals stay what they are. Codes can then say only what survives it. None: as they are, as in the paper.
    Without ``resume`` ValueError if the run holds a checkpoint of this phase.
    """
    model.eval()

    def draw(batch: Trajectories, generator: torch.Generator) -> Drawn:
        noise = meta_controller.draw_noise(batch.batch, batch.steps, generator)
        seen = {} if embedded_view is None else {"embedded_states": embedded_view(batch.states, generator)}
        return {**noise._asdict(), **seen}

    def loss_function(batch: Trajectories, step: int, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        alpha = config.alpha_at(step)
        losses, output = model.steered_losses(
            batch.states,
            batch.actions,
            meta_controller,
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
    return meta_controller
