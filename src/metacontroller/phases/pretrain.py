"""Phase 1, pretraining: an autoregressive model of the experts' actions (paper §1).

    loss = mean over real steps of  -log p(a_t | o_1:t) - lambda log p(o_{t+1} | o_1:t)

Metrics: ``loss``, ``action_loss`` and, with lambda > 0, ``state_loss``, all in nats per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metacontroller.data.trajectories import Trajectories
from metacontroller.models.transformer import Transformer
from metacontroller.phases.parallel import processes
from metacontroller.phases.training import Drawn, Generate, OptimizerConfig, train
from metacontroller.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """optimizer: how long and how fast. state_loss_weight: lambda. seed: of the episodes."""

    optimizer: OptimizerConfig
    state_loss_weight: float = 0.0
    seed: int = 0


def pretrain(
    config: PretrainConfig,
    model: Transformer,
    generate: Generate,
    run: RunFolder,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> Transformer:
    """Trains ``model`` in place on episodes from ``generate``; writes ``base_model.safetensors`` to the run."""
    weight = config.state_loss_weight

    def loss_function(batch: Trajectories, step: int, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        losses = model.behavior_cloning_loss(
            batch.states, batch.actions, batch.lengths, with_state_loss=weight > 0, checked=step > 0
        )
        metrics = {"action_loss": losses.action, **({"state_loss": losses.state} if weight > 0 else {})}
        return losses.action + weight * losses.state, metrics

    train(
        "pretrain",
        config.optimizer,
        model,
        list(model.parameters()),
        generate,
        loss_function,
        run,
        seed=config.seed,
        resume=resume,
        quiet=quiet,
    )
    if processes(next(model.parameters()).device.type).is_main:
        model.save(run.path / "base_model.safetensors")
    return model
