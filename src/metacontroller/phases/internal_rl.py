"""Phase 3, internal RL: reinforcement learning over abstract actions (C.5, algorithms 1-3), and its raw-action twin.

Frozen model, gate and controller decoder together with the task are the environment; the policy pi(z | e) acts in it
only at switches. One update: a batch of fresh episodes, advantages (R - mean) / (std + delta), a few passes of the
clipped surrogate over the stored residuals. The frozen model is never run again for the update. Several processes
share each batch, see `phases.parallel`.

Metrics: ``success``, the share of episodes of the batch just played that the environment calls solved, and their mean
``return``; ``episodes`` so far, ``decisions`` and ``steps`` per episode, ``progress`` (subgoals done); of the last
optimizer step ``entropy_per_code`` of the policy's Gaussian in nats, ``approx_kl`` between the policy that played and
the present one, ``clip_fraction`` of decisions whose ratio the clip bounds, ``grad_norm`` before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metacontroller.control.losses import clipped_surrogate, trajectory_advantages
from metacontroller.control.metacontroller import MetaController
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.envs.gridworld_pinpad import PinpadBatch, PinpadConfig, sample_layouts
from metacontroller.envs.tasks import Task
from metacontroller.errors import UserError
from metacontroller.models.readouts import gaussian_log_prob
from metacontroller.models.transformer import Transformer
from metacontroller.phases.parallel import Processes, processes
from metacontroller.phases.rollout import (
    AbstractRollout,
    RawRollout,
    Rollout,
    policy_proposal,
    rollout_abstract,
    rollout_raw,
)
from metacontroller.phases.training import Learner
from metacontroller.progress import track
from metacontroller.run_folder import RunFolder

DECISIONS_AT_ONCE = 8192  # of an update, padding included: bounds memory


@dataclass(frozen=True, kw_only=True)
class InternalRLConfig:
    """Phase 3, and its raw-action twin."""

    episodes: int
    """Episodes in all."""
    batch_size: int = 1024
    """Episodes an update."""
    lr: float = 3e-5
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    passes: int = 1
    """Update epochs over each batch."""
    minibatches: int = 1
    """Chunks of a batch, an optimizer step each."""
    eps_clip: float = 0.2
    """epsilon of the clipped surrogate."""
    delta: float = 1e-3
    """Added to the standard deviation of returns (C.5: about 1e-3)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm (the paper is silent)."""
    checkpoint_every: int = 20
    """Updates from one checkpoint to the next."""
    seed: int = 0
    """Seed of layouts and actions; a run derives it from its own seed."""

    def __post_init__(self) -> None:
        for name in ("episodes", "batch_size", "passes", "minibatches", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.batch_size % self.minibatches:
            raise UserError(f"batch_size {self.batch_size} is not a multiple of minibatches {self.minibatches}.")

    @property
    def updates(self) -> int:
        """Number of updates that the episodes allow."""
        return math.ceil(self.episodes / self.batch_size)


def task_grids(
    config: PinpadConfig,
    task: Sequence[int],
    n: int,
    generator: torch.Generator,
    subgoals: Sequence[Task] | None = None,
) -> PinpadBatch:
    """n grids with new random layouts that ask for one task. subgoals: the vocabulary, see `PinpadBatch`."""
    tasks = torch.tensor([task]).expand(n, -1).to(generator.device)
    lengths = torch.full((n,), len(task), device=generator.device)
    layouts = sample_layouts(config, n, generator, generator.device)
    return PinpadBatch(config, layouts, tasks, lengths, subgoals=subgoals)


def internal_rl(
    config: InternalRLConfig,
    model: Transformer,
    meta_controller: MetaController,
    new_grids: Callable[[int, torch.Generator], PinpadBatch],
    run: RunFolder,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Trains the policy of ``meta_controller`` in place on episodes from ``new_grids(n, generator)``.

    Writes the metacontroller, of which only the policy has changed, to ``internal_rl_policy.safetensors`` in the run.
    Without ``resume`` ValueError if the run holds a checkpoint of this phase.
    """
    model.eval()
    meta_controller.eval()

    def play(n: int, generator: torch.Generator) -> AbstractRollout:
        grids = new_grids(n, generator)
        return rollout_abstract(model, meta_controller, grids, policy_proposal(meta_controller, generator), generator)

    def surrogate(rollout: AbstractRollout, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        distribution, _ = meta_controller.policy(rollout.residual)
        log_prob = gaussian_log_prob(distribution, rollout.code).sum(-1)
        mask = length_mask(rollout.lengths, rollout.code.shape[1])
        log_std = distribution.chunk(2, -1)[1].sum(-1)
        entropy = masked_mean(log_std, mask) + 0.5 * meta_controller.dim_latent * math.log(2 * math.pi * math.e)
        loss = clipped_surrogate(log_prob, rollout.log_prob, advantage[:, None], mask, config.eps_clip)
        metrics = _ratio_metrics(log_prob, rollout.log_prob, mask, config.eps_clip)
        return loss, {**metrics, "entropy_per_code": entropy.detach()}

    _reinforce("internal_rl", config, meta_controller.policy, play, surrogate, run, resume=resume, quiet=quiet)
    if processes(next(model.parameters()).device.type).is_main:
        meta_controller.save(run.path / "internal_rl_policy.safetensors")
    return meta_controller


def raw_action_rl(
    config: InternalRLConfig,
    model: Transformer,
    new_grids: Callable[[int, torch.Generator], PinpadBatch],
    run: RunFolder,
    *,
    resume: bool = False,
    quiet: bool = False,
) -> Transformer:
    """The baseline: the same clipped surrogate on the base model's own actions.

    Trains ``model`` in place: give a copy. Writes it to ``raw_action_model.safetensors`` in the run. Without ``resume``
    ValueError if the run holds a checkpoint of this phase.
    """
    model.eval()

    def play(n: int, generator: torch.Generator) -> RawRollout:
        return rollout_raw(model, new_grids(n, generator), generator)

    def surrogate(rollout: RawRollout, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model.action_readout(model.upper(model.residual(rollout.states, rollout.actions)))
        log_prob = model.action_readout.log_prob(logits, rollout.actions)
        mask = length_mask(rollout.steps, rollout.actions.shape[1])
        loss = clipped_surrogate(log_prob, rollout.log_prob, advantage[:, None], mask, config.eps_clip)
        return loss, _ratio_metrics(log_prob, rollout.log_prob, mask, config.eps_clip)

    _reinforce("raw_action_rl", config, model, play, surrogate, run, resume=resume, quiet=quiet)
    if processes(next(model.parameters()).device.type).is_main:
        model.save(run.path / "raw_action_model.safetensors")
    return model


def _ratio_metrics(log_prob: Tensor, old: Tensor, mask: Tensor, eps_clip: float) -> dict[str, Tensor]:
    difference = (log_prob - old).detach().masked_fill(~mask, 0.0)
    clipped = ((difference.exp() - 1).abs() > eps_clip).to(difference.dtype)
    return {
        "approx_kl": masked_mean(difference.exp() - 1 - difference, mask),
        "clip_fraction": masked_mean(clipped, mask),
    }


def _reinforce(
    phase: str,
    config: InternalRLConfig,
    module: nn.Module,
    play: Callable,
    surrogate: Callable,
    run: RunFolder,
    *,
    resume: bool,
    quiet: bool,
) -> None:
    """The loop both kinds of RL share: play a batch, a few passes over it, log, save. Trains ``module`` in place.

    play(n, generator) -> rollout of n episodes. surrogate(rollout, advantage) -> loss, metrics.
    """
    parameters = list(module.parameters())
    generator = torch.Generator(parameters[0].device).manual_seed(config.seed)
    learner = Learner(
        module,
        parameters,
        generator,
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    workers = learner.processes
    episodes = workers.share(config.batch_size, config.minibatches)
    run.begin(phase, resume=resume)
    first = learner.restore(run, phase)[0] if resume else 0
    if workers.is_main:
        run.rewind_metrics(phase, first)
    with track(config.updates, phase, start=first, quiet=quiet or not workers.is_main) as progress:
        for update in range(first, config.updates):
            numbers = workers.own_generator(generator)
            rollout = play(episodes, numbers)
            done = update + 1
            metrics = {"episodes": done * config.batch_size, **_episode_means(rollout, workers)}
            advantages = trajectory_advantages(workers.gather(rollout.returns).view(-1), config.delta)
            advantage = advantages.view(workers.count, -1)[workers.rank]
            # a batch in which all episodes end alike has nothing to teach: no advantage, no gradient
            for _ in range(config.passes if bool(advantages.any()) else 0):
                order = torch.randperm(episodes, generator=numbers, device=numbers.device)
                for rows in order.chunk(config.minibatches):
                    metrics |= _surrogate_in_parts(rollout, advantage, rows, surrogate, workers)
                    metrics["grad_norm"] = learner.descend()
            if workers.is_main:
                run.log_metrics(phase, done, **metrics)
            progress.update(done, success=metrics["success"], episodes=metrics["episodes"])
            if done % config.checkpoint_every == 0 or done == config.updates:
                learner.save(run, phase, done)
    workers.wait()


def _surrogate_in_parts(
    rollout: Rollout, advantage: Tensor, rows: Tensor, surrogate: Callable, workers: Processes
) -> dict[str, Tensor]:
    """Backward of this process's share of the surrogate's mean over all decisions of all processes' ``rows``; returns
    the metrics, means over the same.

    Parts hold episodes of similar length, the shortest at least half as long as the longest, and `DECISIONS_AT_ONCE`
    padded decisions at most: memory does not grow with the batch, and little is spent on padding.
    """
    rows = rows[torch.argsort(rollout.decisions[rows], descending=True, stable=True)]
    total, metrics = rollout.decisions[rows].sum(), {}
    workers.add_up([total])
    while len(rows):
        longest = rollout.decisions[rows[0]]
        similar = int((2 * rollout.decisions[rows] >= longest).sum())
        size = min(similar, max(1, DECISIONS_AT_ONCE // int(longest)))
        part, rows = rows[:size], rows[size:]
        share = rollout.decisions[part].sum() / total
        loss, measured = surrogate(rollout.index(part), advantage[part])
        (share * loss).backward()
        for name, value in measured.items():
            metrics[name] = metrics.get(name, 0.0) + share * value
    workers.add_up(list(metrics.values()))
    return metrics


def _episode_means(rollout: Rollout, workers: Processes) -> dict[str, Tensor]:
    """Means over the batch of episodes, all processes' together."""
    means = {
        "success": rollout.success.float().mean(),
        "return": rollout.returns.mean(),
        "steps": rollout.steps.float().mean(),
        "progress": rollout.subgoals_done.float().mean(),
    }
    if isinstance(rollout, AbstractRollout):
        means["decisions"] = rollout.lengths.float().mean()
    means = {name: mean / workers.count for name, mean in means.items()}
    workers.add_up(list(means.values()))
    return means
