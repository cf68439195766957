"""The training loop of internal and raw-action RL: rollout, clipped surrogate, log, checkpoint (C.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metacontroller.control.losses import log_ratio, trajectory_advantages
from metacontroller.data.trajectories import masked_mean
from metacontroller.domains.base import BatchedEnv
from metacontroller.errors import UserError
from metacontroller.phases.rollout import AbstractRollout, Rollout, joined
from metacontroller.ranges import COUNT, NOT_NEGATIVE, POSITIVE, ROWS, SEED, Number, check_fields
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes
from metacontroller.training.divergence import NotFinite, check_module, check_returns, diverged
from metacontroller.training.interruption import finishing, requested, stop
from metacontroller.training.optimizer import Learner
from metacontroller.training.progress import announce, track

Reset = Callable[[int, torch.Generator], BatchedEnv]
"""``reset(n, generator)`` starts n episodes; all their randomness comes from the generator."""

KEPT = "kept"
"""Prefix of the checkpoint's tensors of episodes that wait for an update."""

MAX_CHUNK_DECISIONS = 8192  # decisions in one chunk of a minibatch, padding included: bounds memory


@dataclass(frozen=True, kw_only=True)
class InternalRLConfig:
    """Phase 3, and raw-action RL. UserError for values out of range."""

    episodes: int
    """Total number of episodes."""
    batch_size: int = 1024
    """Episodes per update."""
    lr: float = 3e-5
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    update_epochs: int = 1
    """Update epochs over each batch, at most."""
    target_kl: float | None = None
    """The updates on a batch end when approx_kl is beyond this, in nats per decision; None: after all epochs."""
    min_better: int = 1
    """An update waits until this many episodes have a return above the mean: those of batches with fewer are kept, and
    learned from with the next."""
    minibatches: int = 1
    """Minibatches of a batch, one optimizer step each."""
    eps_clip: float = 0.2
    """epsilon of the clipped surrogate."""
    entropy_weight: float = 0.0
    """Weight of the policy's mean entropy, in nats a decision, in what is maximised; the paper's is 0."""
    delta: float = 1e-3
    """Added to the standard deviation of returns (C.5: about 1e-3)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm (our choice; the paper gives none)."""
    checkpoint_every: int = 20
    """Updates from one checkpoint to the next."""
    seed: int = 0
    """Seed of layouts and actions; a run derives it from its own seed."""

    def __post_init__(self) -> None:
        check_fields(self, episodes=COUNT, batch_size=ROWS, update_epochs=COUNT, minibatches=ROWS)
        check_fields(self, checkpoint_every=COUNT, seed=SEED)
        check_fields(self, lr=POSITIVE, weight_decay=NOT_NEGATIVE, max_grad_norm=POSITIVE, eps_clip=POSITIVE)
        check_fields(self, entropy_weight=NOT_NEGATIVE, delta=NOT_NEGATIVE, target_kl=Number(0, above=True, none=True))
        check_fields(self, min_better=COUNT)
        if self.min_better > self.batch_size:
            raise UserError(f"min_better is {self.min_better}; expected 1..{self.batch_size}, a batch's episodes.")
        if self.batch_size % self.minibatches:
            raise UserError(f"batch_size {self.batch_size} is not a multiple of minibatches {self.minibatches}.")

    @property
    def updates(self) -> int:
        """Number of updates that the episodes allow."""
        return math.ceil(self.episodes / self.batch_size)


def ratio_metrics(log_prob: Tensor, old: Tensor, mask: Tensor, eps_clip: float) -> dict[str, Tensor]:
    """approx_kl and clip_fraction, scalars, from log-probabilities (b, t) of the updated and the acting policy."""
    difference = log_ratio(log_prob.detach(), old, mask)
    clipped = ((difference.exp() - 1).abs() > eps_clip).to(difference.dtype)
    return {
        "approx_kl": masked_mean(difference.exp() - 1 - difference, mask),
        "clip_fraction": masked_mean(clipped, mask),
    }


def reinforce(
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
    """Trains ``module`` in place: in each update, play a batch, run the update epochs over it, log, checkpoint.

    play(n, generator) -> rollout of n episodes. surrogate(rollout, advantage (b,)) -> loss, metrics.

    While fewer than ``min_better`` episodes have a return above the mean, no update is made, so the policy stays the
    one that played them; of such a batch only those episodes are kept. Where returns have two values, gradients of
    normalised advantages point from the mean of the worse episodes to that of the better ones: to leave out worse
    episodes of former batches changes their length and not where they point. An episode that could not start says
    nothing about the policy: it is played and counted as lost, and its return has no part in what is learned.

    UserError if the run holds a checkpoint of ``phase`` and ``resume`` is false; DivergedError at the first return,
    loss, gradient or parameter that is not finite, see `training.divergence`.
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
    first, restored = learner.restore(run, phase, config.updates) if resume else (0, {})
    kept = _own_part(restored, workers, generator.device)
    alone = run.held() if workers.is_main else nullcontext()
    with alone, track(config.updates, phase, start=first, quiet=quiet or not workers.is_main) as progress, finishing():
        if workers.is_main:
            run.rewind_metrics(phase, first)
        for update in range(first, config.updates):
            rng = workers.own_generator(generator)
            rollout = play(episodes, rng)
            done = update + 1
            metrics = {"episodes": done * config.batch_size, **episode_means(rollout, workers)}
            if done == 1:
                question_success(phase, metrics["success"], quiet=quiet or not workers.is_main)
            if kept:
                rollout = rollout.preceded_by(kept)
            try:
                returns = workers.gather_uneven(rollout.returns[rollout.decisions > 0])
                check_returns(torch.cat(returns))
                kept = _better(config, rollout, torch.cat(returns))
                if kept is None:
                    metrics |= _learn(config, learner, rollout, returns, surrogate, rng)
                check_module(module)
                if workers.is_main:
                    run.log_metrics(phase, done, **metrics)
                lost = ("lost",) if metrics.get("lost", 0) > 0 else ()  # a share of the batch
                progress.update(done, **{name: metrics[name] for name in ("success", "return", *lost, "episodes")})
                stopping = workers.any(requested())
                if stopping or done % config.checkpoint_every == 0 or done == config.updates:
                    learner.save(run, phase, done, _all_parts(kept or {}, workers))
            except NotFinite as found:
                batch = {name: value for name, value in vars(rollout).items() if value is not None}
                facts = {
                    "lr": config.lr,
                    "metrics": {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()},
                }
                raise diverged(run, phase, done, found, module, batch, writes=workers.is_main, **facts) from None
            if stopping:
                workers.wait()
                stop()
    workers.wait()


def _better(config: InternalRLConfig, rollout: Rollout, returns: Tensor) -> dict[str, Tensor] | None:
    """None if an update is due: enough of the returns (b,) of all processes are above their mean. Else what is kept of
    this process's episodes. returns: of the episodes that could start."""
    if int((returns > returns.mean()).sum()) >= config.min_better:
        return None
    rows = ((rollout.returns > returns.mean()) & (rollout.decisions > 0)).nonzero().squeeze(1)
    return {name: value for name, value in vars(rollout.index(rows)).items() if value is not None} if len(rows) else {}


def _all_parts(kept: dict[str, Tensor], workers: Processes) -> dict[str, Tensor]:
    """What all processes keep, for a checkpoint: ``kept.RANK.NAME``."""
    parts = workers.gather_objects({name: value.cpu() for name, value in kept.items()})
    return {f"{KEPT}.{rank}.{name}": value for rank, part in enumerate(parts) for name, value in part.items()}


def _own_part(tensors: dict[str, Tensor], workers: Processes, device: torch.device) -> dict[str, Tensor]:
    """What this process kept, from the tensors of a checkpoint. Where more processes made it, they are shared out."""
    parts: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{KEPT}."):
            _, rank, name = key.split(".")
            parts.setdefault(int(rank), {})[name] = value.to(device)
    own = [parts[rank] for rank in sorted(parts) if rank % workers.count == workers.rank]
    return joined(own) if own else {}


def _learn(
    config: InternalRLConfig,
    learner: Learner,
    rollout: Rollout,
    returns: list[Tensor],
    surrogate: Callable,
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
    rollout: Rollout, advantage: Tensor, rows: Tensor, surrogate: Callable, workers: Processes
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Runs backward through the surrogate of the episodes ``rows``, chunk by chunk; returns this process's part of the
    loss, and the metrics.

    Loss and metrics are means over all decisions of the minibatch, of all processes together; without any decision
    there is None and no metric. A process that alone has none adds an episode of its own with weight 0, so that it
    takes part in every exchange, with the same gradients and metrics as the others.
    """
    total, metrics = rollout.decisions[rows].sum(), {}
    whole = advantage.new_zeros(())
    workers.all_reduce([total])
    if not total:
        return None, metrics
    parts = [(chunk, rollout.decisions[chunk].sum().to(whole) / total) for chunk in _chunks(rollout.decisions, rows)]
    for chunk, share in parts or [(rows.new_zeros(1), 0.0 * whole)]:
        loss, measured = surrogate(rollout.index(chunk), advantage[chunk])
        (share * loss).backward()
        whole += (share * loss).detach()
        for name, value in measured.items():
            metrics[name] = metrics.get(name, 0.0) + share * value
    workers.all_reduce(list(metrics.values()))
    return whole, metrics


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


def question_success(phase: str, success: Tensor, *, quiet: bool) -> None:
    """Says so where the first batch, which was played before any update, has nothing but success."""
    if success > 1 - 1e-6:
        announce(
            f"{phase}: warning: success is 1.00 before any update, so there is nothing left to learn but a higher "
            "return; why go on? Stop here, or choose a harder task.",
            quiet,
        )


def episode_means(rollout: Rollout, workers: Processes) -> dict[str, Tensor]:
    """Means over the batch's episodes of all processes."""
    means = {
        "success": rollout.success.float().mean(),
        "return": rollout.returns.mean(),
        "steps": rollout.steps.float().mean(),
        "subgoals_done": rollout.subgoals_done.float().mean(),
    }
    if isinstance(rollout, AbstractRollout):
        means["decisions"] = rollout.lengths.float().mean()
    if rollout.lost is not None:
        means["lost"] = rollout.lost.float().mean()
    means = {name: mean / workers.count for name, mean in means.items()}
    workers.all_reduce(list(means.values()))
    return means
