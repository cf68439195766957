"""Baseline: reinforcement learning over raw actions (C.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from metacontroller.arguments import checked_kinds
from metacontroller.control.losses import clipped_surrogate
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.artefacts import RAW_MODEL, save_artefacts
from metacontroller.phases.policy_gradient import InternalRLConfig, Reset, ratio_metrics, reinforce
from metacontroller.phases.rollout import RawRollout, rollout_raw
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.evaluation_mode import evaluation_mode


@checked_kinds
def raw_action_rl(
    config: InternalRLConfig,
    model: SteerableModel,
    reset: Reset,
    run: RunFolder,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> SteerableModel:
    """Trains ``model`` in place with the clipped surrogate of internal RL on its own actions; pass a copy.

    reset(n, generator) starts n episodes. Writes the model to ``raw_action_model.safetensors`` in the run. UserError if
    the run holds a checkpoint of this phase and ``resume`` is false.
    """
    evaluation_mode(model)

    def play(n: int, generator: torch.Generator) -> RawRollout:
        return rollout_raw(model, reset(n, generator), generator)

    def surrogate(rollout: RawRollout, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model.action_readout(model.upper(model.residual(rollout.states, rollout.actions)))
        log_prob = model.action_readout.log_prob(logits, rollout.actions)
        mask = length_mask(rollout.steps, rollout.actions.shape[1])
        loss = clipped_surrogate(log_prob, rollout.log_prob, advantage[:, None], mask, config.eps_clip)
        if config.entropy_weight:
            loss = loss - config.entropy_weight * masked_mean(model.action_readout.entropy(logits), mask)
        return loss, ratio_metrics(log_prob, rollout.log_prob, mask, config.eps_clip)

    reinforce("raw_action_rl", config, model, play, surrogate, run, resume=resume, quiet=quiet)
    save_artefacts(run, processes(next(model.parameters()).device.type), {RAW_MODEL: model})
    return model
