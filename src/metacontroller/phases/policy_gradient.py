"""Policy gradients of internal and raw-action RL: updates with the clipped surrogate over batches of episodes (C.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metacontroller.control.losses import log_ratio, trajectory_advantages
from metacontroller.data.trajectories import masked_mean
from metacontroller.domains.base import BatchedEnv
from metacontroller.errors import UserError
from metacontroller.phases.rollout import Rollout, joined
from metacontroller.phases.updates import PlayedUpdates
from metacontroller.ranges import Count, NotNegative, Positive, Rows, Seed, check_fields, require
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.divergence import check_returns
from metacontroller.training.optimizer import Learner
from metacontroller.training.repeat import repeat_updates

Reset = Callable[[int, torch.Generator], BatchedEnv]
"""``reset(n, generator)`` starts n episodes; all their randomness comes from the generator."""

Play = Callable[[int, torch.Generator], Any]
"""``play(n, generator)`` -> rollout of n episodes."""

Surrogate = Callable[[Any, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Rollout of b episodes, their advantages (b,) -> loss and metrics, means over decisions."""

WAITING = "kept"
"""Prefix of the checkpoint's tensors of episodes that wait for an update."""

MAX_CHUNK_DECISIONS = 8192  # decisions in one chunk of a minibatch, padding included: bounds memory


@dataclass(frozen=True, kw_only=True)
class InternalRLConfig:
    """Phase 3, and raw-action RL. UserError for values out of range."""

    episodes: Count
    """Total number of episodes."""
    batch_size: Rows = 1024
    """Episodes per update."""
    lr: Positive = 3e-5
    """Learning rate of AdamW."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW."""
    update_epochs: Count = 1
    """Update epochs over each batch, at most."""
    target_kl: Positive | None = None
    """The updates on a batch end when approx_kl is beyond this, in nats per decision; None: after all epochs."""
    min_better: Count = 1
    """An update waits until this many episodes have a return above the mean: those of batches with fewer are kept, and
    learned from with the next."""
    minibatches: Rows = 1
    """Minibatches of a batch, one optimizer step each."""
    eps_clip: Positive = 0.2
    """epsilon of the clipped surrogate."""
    entropy_weight: NotNegative = 0.0
    """Weight of the policy's mean entropy, in nats a decision, in what is maximised; the paper's is 0."""
    delta: NotNegative = 1e-3
    """Added to the standard deviation of returns (C.5: about 1e-3)."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm (our choice; the paper gives none)."""
    checkpoint_every: Count = 20
    """Updates from one checkpoint to the next."""
    seed: Seed = 0
    """Seed of layouts and actions; a run derives it from its own seed."""

    def __post_init__(self) -> None:
        check_fields(self)
        batch = self.batch_size
        require(self.min_better <= batch, "min_better", self.min_better, f"1..{batch}, a batch's episodes")
        if batch % self.minibatches:
            raise UserError(f"batch_size {batch} is not a multiple of minibatches {self.minibatches}.")

    @property
    def updates(self) -> int:
        """Number of updates that the episodes allow."""
        return math.ceil(self.episodes / self.batch_size)


def ratio_metrics(log_prob: Tensor, old: Tensor, mask: Tensor, eps_clip: float) -> dict[str, Tensor]:
    """approx_kl and clip_fraction, scalars, from log-probabilities (b, t) of the updated and the acting policy."""
    difference = log_ratio(log_prob.detach(), old, mask)
    clipped = ((difference.exp() - 1).abs() > eps_clip).to(difference.dtype)
    approx_kl = masked_mean(difference.exp() - 1 - difference, mask)
    return {"approx_kl": approx_kl, "clip_fraction": masked_mean(clipped, mask)}


def reinforce(
    phase: str,
    config: InternalRLConfig,
    module: nn.Module,
    play: Play,
    surrogate: Surrogate,
    run: RunFolder,
    *,
    resume: bool,
    quiet: bool,
) -> None:
    """Trains ``module`` in place: in each update, play a batch, run the update epochs over it, log, checkpoint.

    While fewer than ``min_better`` episodes have a return above the mean, no update is made, so the policy stays the
    one that played them; of such a batch only those episodes wait for the next. Where returns have two values,
    gradients of normalised advantages point from the mean of the worse episodes to that of the better ones: to leave
    out worse episodes of former batches changes their length and not where they point. An episode that could not start
    says nothing about the policy: it is played and counted as lost, and its return has no part in what is learned.

    UserError if the run holds a checkpoint of ``phase`` and ``resume`` is false; DivergedError: see `repeat_updates`.
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
    share = learner.processes.share(config.batch_size, config.minibatches)
    run.begin(phase, resume=resume)
    first, restored = learner.restore(run, phase, config.updates) if resume else (0, {})
    waiting = _waiting_here(restored, learner.processes, generator.device)
    updates = _PolicyGradient(phase, learner, config.batch_size, quiet, config, play, surrogate, share, waiting)
    repeat_updates(phase, updates, first, config.updates, config.checkpoint_every, run, quiet=quiet)


@dataclass
class _PolicyGradient(PlayedUpdates):
    """Updates of `reinforce`. share: episodes of a batch that this process plays. waiting: those of its episodes that
    wait for an update, fields of a rollout by name."""

    config: InternalRLConfig
    play_episodes: Play
    surrogate: Surrogate
    share: int
    waiting: dict[str, Tensor]

    def play(self) -> tuple[Rollout, Rollout]:
        self.rng = self.learner.processes.own_generator(self.learner.generator)
        played = self.play_episodes(self.share, self.rng)
        return played, played.preceded_by(self.waiting) if self.waiting else played

    def learn(self, rollout: Rollout) -> dict[str, Tensor]:
        returns = self.learner.processes.gather(rollout.returns[rollout.decisions > 0])
        everyone = torch.cat(returns)
        check_returns(everyone)
        if int((everyone > everyone.mean()).sum()) >= self.config.min_better:
            self.waiting = {}
            return _learn(self.config, self.learner, rollout, returns, self.surrogate, self.rng)
        rows = ((rollout.returns > everyone.mean()) & (rollout.decisions > 0)).nonzero().squeeze(1)
        better = vars(rollout.index(rows)) if len(rows) else {}
        self.waiting = {name: value for name, value in better.items() if value is not None}
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What waits in all processes: ``kept.RANK.NAME``."""
        waiting = {name: value.cpu() for name, value in self.waiting.items()}
        parts = self.learner.processes.gather(waiting)
        return {f"{WAITING}.{rank}.{name}": value for rank, part in enumerate(parts) for name, value in part.items()}


def _waiting_here(tensors: dict[str, Tensor], workers: Processes, device: torch.device) -> dict[str, Tensor]:
    """What waits in this process, from a checkpoint's tensors; what more processes left is shared out."""
    parts: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{WAITING}."):
            _, rank, name = key.split(".")
            parts.setdefault(int(rank), {})[name] = value.to(device)
    here = [parts[rank] for rank in sorted(parts) if rank % workers.count == workers.rank]
    return joined(here) if here else {}


def _learn(
    config: InternalRLConfig,
    learner: Learner,
    rollout: Rollout,
    returns: list[Tensor],
    surrogate: Surrogate,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Runs the update epochs over this process's episodes of a batch; returns the metrics of the last minibatch.

    returns: of each process, of the episodes that could start. If all are equal, there is no advantage and so no
    gradient, and no step is taken.
    """
    workers, metrics = learner.processes, {}
    advantages = trajectory_advantages(torch.cat(returns), config.delta)
    advantage = torch.zeros_like(rollout.returns)
    advantage[rollout.decisions > 0] = advantages.split([len(part) for part in returns])[workers.rank]
    for rows in _minibatches(config, len(advantage), rng) if bool(advantages.any()) else ():
        loss, measured = _surrogate_in_chunks(rollout, advantage, rows, surrogate, workers)
        if loss is None:
            continue
        metrics |= measured
        if config.target_kl is not None and metrics["approx_kl"] > config.target_kl:
            learner.zero_grad()
            break
        metrics["grad_norm"] = learner.optimizer_step(loss)
    return metrics


def _minibatches(config: InternalRLConfig, episodes: int, rng: torch.Generator) -> Iterator[Tensor]:
    """The rows of each optimizer step: every update epoch has all episodes once, in an order of its own.

    There are as many steps in every process, whatever its number of episodes: those that waited for an update are
    spread unevenly, and processes that took different numbers of steps would wait for each other for ever.
    """
    for _ in range(config.update_epochs):
        yield from torch.randperm(episodes, generator=rng, device=rng.device).tensor_split(config.minibatches)


def _surrogate_in_chunks(
    rollout: Rollout, advantage: Tensor, rows: Tensor, surrogate: Surrogate, workers: Processes
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Runs backward through the surrogate of the episodes ``rows``, chunk by chunk; returns this process's part of the
    loss, and the metrics.

    Loss and metrics are means over all decisions of the minibatch, of all processes together; without any decision
    there is None and no metric. A process that alone has none adds an episode of its own with weight 0, so that it
    takes part in every exchange, with the same gradients and metrics as the others.
    """
    total, metrics = rollout.decisions[rows].sum(), {}
    sum_of_losses = advantage.new_zeros(())
    workers.all_reduce([total])
    if not total:
        return None, metrics
    chunks = list(_chunks(rollout.decisions, rows))
    shares = [rollout.decisions[chunk].sum().to(advantage) / total for chunk in chunks]
    if not chunks:
        chunks, shares = [rows.new_zeros(1)], [0.0 * sum_of_losses]
    for chunk, share in zip(chunks, shares, strict=True):
        loss, measured = surrogate(rollout.index(chunk), advantage[chunk])
        (share * loss).backward()
        sum_of_losses += (share * loss).detach()
        for name, value in measured.items():
            metrics[name] = metrics.get(name, 0.0) + share * value
    workers.all_reduce(list(metrics.values()))
    return sum_of_losses, metrics


def _chunks(decisions: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """The episodes among ``rows`` that made decisions (b,), in chunks.

    A chunk holds episodes of similar length, the shortest at least half as long as the longest, and at most
    `MAX_CHUNK_DECISIONS` padded decisions: so memory does not grow with the batch, and there is little padding.
    """
    rows = rows[decisions[rows] > 0]
    rows = rows[torch.argsort(decisions[rows], descending=True, stable=True)]
    while len(rows):
        longest = decisions[rows[0]]
        similar = int((2 * decisions[rows] >= longest).sum())
        size = min(similar, max(1, MAX_CHUNK_DECISIONS // int(longest)))
        yield rows[:size]
        rows = rows[size:]
