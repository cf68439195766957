"""Phase 3, internal RL: reinforcement learning over abstract actions (C.5, algorithms 1-3).

The frozen model, gate and controller together with the task are the environment; the policy pi(z | e) acts in it only
at switches. One update: a batch of new episodes, advantages (R - mean) / (std + delta), and some update epochs of the
clipped surrogate over the stored residuals, which do not run the frozen model again; ``target_kl`` ends them sooner.
Several processes share each batch, see `training.distributed`.

Metrics: of the batch, see `phases.updates`; of the last minibatch ``entropy_per_code`` of the policy in nats,
``approx_kl`` between the policy that acted and the updated one, ``clip_fraction``, the share of decisions whose ratio
is clipped, and ``grad_norm`` before clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metacontroller.arguments import checked_kinds
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.policy_losses import StoredDecisions, surrogate_of_decisions
from metacontroller.data.trajectories import length_mask
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.artefacts import POLICY, save_artefacts
from metacontroller.phases.policy_gradient import InternalRLConfig, Reset, ratio_metrics, reinforce
from metacontroller.phases.rollout import AbstractRollout, policy_proposal, rollout_abstract
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.evaluation_mode import evaluation_mode


@checked_kinds
def internal_rl(
    config: InternalRLConfig,
    model: SteerableModel,
    meta_controller: MetaController,
    reset: Reset,
    run: RunFolder,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Trains the policy of ``meta_controller`` in place on episodes from ``reset(n, generator)``.

    Writes the metacontroller, of which only the policy has changed, to ``internal_rl_policy.safetensors`` in the run.
    UserError if the run holds a checkpoint of this phase and ``resume`` is false.
    """
    model.eval()
    evaluation_mode(meta_controller)

    def play(n: int, generator: torch.Generator) -> AbstractRollout:
        env = reset(n, generator)
        return rollout_abstract(model, meta_controller, env, policy_proposal(meta_controller, generator), generator)

    def surrogate(rollout: AbstractRollout, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mask = length_mask(rollout.lengths, rollout.code.shape[1])
        stored = StoredDecisions(rollout.residual, rollout.code, rollout.log_prob, advantage[:, None], mask)
        loss, log_prob, distribution = surrogate_of_decisions(meta_controller, stored, config.eps_clip)
        entropy = meta_controller.codes.mean_entropy(distribution, mask)
        if config.entropy_weight:
            loss = loss - config.entropy_weight * entropy
        metrics = ratio_metrics(log_prob, rollout.log_prob, mask, config.eps_clip)
        return loss, {**metrics, "entropy_per_code": entropy.detach()}

    reinforce("internal_rl", config, meta_controller.policy, play, surrogate, run, resume=resume, quiet=quiet)
    save_artefacts(run, processes(next(model.parameters()).device.type), {POLICY: meta_controller})
    return meta_controller
