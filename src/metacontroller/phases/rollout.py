"""Acting: batched episodes of the frozen model in its environment, steered by abstract actions or not (C.5, alg. 2).

Axes: b episodes, k abstract actions (switches) of an episode, t steps, n_e residual, n_z code. Finished episodes are
dropped from the batch, so that the others do not pay for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from metacontroller.arguments import checked_kinds
from metacontroller.control.core import GateUse, Proposer, Reading, SteeredSpan, acting_gate, steer_span
from metacontroller.control.core import Proposal as CodeProposal
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.base import BatchedEnv
from metacontroller.models.precision import weights_cast_once
from metacontroller.models.protocol import SteerableModel

KEEP_SHARE = 0.9  # finished rows are dropped once fewer than this share would remain: moving rows costs time
MANY_ROWS, ROW_STEP = 256, 64  # above MANY_ROWS rows, their number is kept a multiple of ROW_STEP, see `survivors`

Proposal = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Called at switches: (residual (m, n_e), policy state (m, s), rows (m,)) -> code (m, n_z), joint log-probability
(m,), next policy state."""


AnyRollout = TypeVar("AnyRollout", bound="Rollout")


@dataclass
class Rollout:
    """What all rollouts have, (b,) each.

    returns: undiscounted. success: bool, as the environment reports it. steps: of the environment. subgoals_done: of
    the task. lost: bool, whether an exception of the environment ended the episode; None where that cannot happen. An
    episode that could not even start has 0 steps and 0 decisions.
    """

    returns: Tensor
    success: Tensor
    steps: Tensor
    subgoals_done: Tensor
    lost: Tensor | None

    @property
    def decisions(self) -> Tensor:
        """(b,) int64: number of actions that the acting policy chose in each episode."""
        return self.steps

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def index(self: AnyRollout, rows: Tensor) -> AnyRollout:
        """The episodes with indices ``rows`` (m,), cut to the longest of them, but to one decision at least."""
        longest = max(1, int(self.decisions[rows].max()))
        cut = {name: value[rows, :longest] if value.dim() > 1 else value[rows] for name, value in self.tensors.items()}
        return type(self)(**{**vars(self), **cut})

    def preceded_by(self: AnyRollout, former: Mapping[str, Tensor]) -> AnyRollout:
        """These episodes behind ``former`` ones, fields by name; the shorter are padded with zeros."""
        return type(self)(**{**vars(self), **joined([former, self.tensors])})


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Fields of several rollouts, one behind the other; the shorter are padded with zeros."""
    return {name: torch.cat(_equally_long([part[name] for part in parts])) for name in parts[-1]}


def _equally_long(values: list[Tensor]) -> list[Tensor]:
    """Tensors (b,) as they are; tensors (b, t, ...), padded with zeros to the longest t."""
    if values[0].dim() == 1:
        return values
    longest = max(value.shape[1] for value in values)
    return [F.pad(value, [0, 0] * (value.dim() - 2) + [0, longest - value.shape[1]]) for value in values]


@dataclass
class AbstractRollout(Rollout):
    """Episodes as sequences of abstract actions.

    residual (b, k, n_e): what the policy saw at each switch. code (b, k, n_z). log_prob (b, k): joint, when sampled.
    lengths (b,): abstract actions of each episode.
    """

    residual: Tensor
    code: Tensor
    log_prob: Tensor
    lengths: Tensor

    @property
    def decisions(self) -> Tensor:
        return self.lengths


@dataclass
class RawRollout(Rollout):
    """Episodes step by step: states (b, t, ...), actions, log_prob (b, t)."""

    states: Tensor
    actions: Tensor
    log_prob: Tensor


class Actor:
    """A model that acts in a batch of episodes, with its caches and last actions.

    Each step is one `look` and one `act`; steering happens between the two. temperature: of the sampled actions.
    """

    def __init__(
        self,
        model: SteerableModel,
        env: BatchedEnv,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.env, self.generator, self.temperature = model, env, generator, temperature
        self.cache = model.empty_cache(len(env))
        self.past_actions: Tensor | None = None
        self.observation = env.observation  # (b, *obs), of the last `look`

    def look(self) -> Tensor:
        """Reads the current observation; returns the residual at the controlled layer, (b, n_e). Call once a step."""
        self.observation = self.env.observation
        states = self.observation[:, None]
        return self.model.lower(self.model.embed(states, self.past_actions), self.cache.lower)[:, 0]

    def act(self, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples an action from the residual (b, n_e), steered or not, and takes it in the environment.

        Returns the rewards (b,), the actions (b, 1, ...) and the parameters of their distribution (b, 1, ...).
        """
        logits = self.model.action_readout(self.model.upper(residual[:, None], self.cache.upper))
        actions = self.model.action_readout.sample(logits, self.generator, temperature=self.temperature)
        self.past_actions = actions
        return self.env.step(actions[:, 0]), actions, logits

    def keep(self, rows: Tensor) -> None:
        """Keeps only the episodes with indices ``rows``, int64 (m,)."""
        self.env.select(rows)
        self.cache.keep(rows)
        self.past_actions = None if self.past_actions is None else self.past_actions[rows]


def policy_proposal(meta_controller: MetaController, generator: torch.Generator | None, policy: Any = None) -> Proposal:
    """Codes from the metacontroller's policy, or from ``policy(residual (m, 1, n_e), state, rows)`` instead of it."""

    def propose(residual: Tensor, state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = residual[:, None]
        distribution, advanced = meta_controller.policy(read, state) if policy is None else policy(read, state, rows)
        return *_sampled(meta_controller, distribution[:, 0], generator), advanced

    return propose


def prior_proposal(meta_controller: MetaController, generator: torch.Generator | None) -> Proposal:
    """Codes from the prior."""

    def propose(residual: Tensor, state: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prior = meta_controller.codes.prior(residual, len(residual))
        return *_sampled(meta_controller, prior, generator), state

    return propose


def _sampled(
    meta_controller: MetaController, distribution: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Codes (m, n_z) of distributions (m, p), and their joint log-probabilities (m,)."""
    code = meta_controller.codes.sample(distribution, generator)
    return code, meta_controller.codes.log_prob(distribution, code).sum(-1)


@checked_kinds
@torch.no_grad()
@weights_cast_once()
def rollout_abstract(
    model: SteerableModel,
    meta_controller: MetaController,
    env: BatchedEnv,
    propose: Proposal,
    generator: torch.Generator | None = None,
    *,
    watch: Callable[[SteeredSpan], None] | None = None,
) -> AbstractRollout:
    """Plays every episode to its end. A code steers until beta >= threshold; ``propose`` is called only then. watch: is
    shown each step.

    An episode that could not start takes no decision: its observation is none of its own.
    """
    rows = torch.arange(len(env), device=env.steps.device)
    alive = ~(env.terminated | env.truncated)
    actor = Actor(model, env, generator, temperature=meta_controller.action_temperature)
    state, gate = meta_controller.initial_state(len(env)), GateUse(acting_gate(meta_controller))
    decisions, outcome = _Decisions(rows), _Outcome(rows)

    def ask(reading: Reading, policy: Tensor, switch: Tensor) -> CodeProposal:
        """Codes and states of the policy in the rows that switch; the others keep theirs."""
        chosen = (switch & alive).nonzero().squeeze(1)
        read = reading.residual[chosen, 0]
        code, log_prob, advanced = propose(read, policy[chosen], rows[chosen])
        decisions.add(rows[chosen], read, code, log_prob)
        codes = state.z.index_copy(0, chosen, code)
        return CodeProposal(codes[:, None], None, policy.index_copy(0, chosen, advanced))

    proposer = Proposer(ask, at_switches=True)
    while len(rows):
        residual = actor.look()
        span = steer_span(meta_controller, residual[:, None], state, proposer, gate)
        state = span.state
        if watch is not None:
            watch(span)
        steered = (residual + span.control[:, 0]).to(residual.dtype)
        outcome.returns[rows] += actor.act(steered)[0]
        alive = ~(env.terminated | env.truncated)
        remaining = survivors(alive)
        if len(remaining) < KEEP_SHARE * len(rows):
            outcome.close(rows, env)
            actor.keep(remaining)
            rows, alive, state = rows[remaining], alive[remaining], state.index(remaining)
    residuals, codes, log_probs = decisions.padded()
    taken = {"residual": residuals, "code": codes, "log_prob": log_probs, "lengths": decisions.count}
    return AbstractRollout(**taken, **vars(outcome))


@checked_kinds
@torch.no_grad()
@weights_cast_once()
def rollout_raw(model: SteerableModel, env: BatchedEnv, generator: torch.Generator | None = None) -> RawRollout:
    """Plays every episode to its end with the model's own actions."""
    rows = torch.arange(len(env), device=env.steps.device)
    actor, outcome = Actor(model, env, generator), _Outcome(rows)
    states, actions, log_probs = [], [], []
    while len(rows):
        residual = actor.look()
        states.append(_all_rows(actor.observation, rows, len(outcome.steps)))
        reward, action, logits = actor.act(residual)
        log_prob = model.action_readout.log_prob(logits, action)[:, 0]
        actions.append(_all_rows(action[:, 0], rows, len(outcome.steps)))
        log_probs.append(_all_rows(log_prob, rows, len(outcome.steps)))
        outcome.returns[rows] += reward
        remaining = survivors(~(env.terminated | env.truncated))
        if len(remaining) < KEEP_SHARE * len(rows):
            outcome.close(rows, env)
            actor.keep(remaining)
            rows = rows[remaining]
    return RawRollout(
        states=torch.stack(states, 1),
        actions=torch.stack(actions, 1),
        log_prob=torch.stack(log_probs, 1),
        **vars(outcome),
    )


def _all_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count, ...): values (m, ...) at indices rows (m,), zeros elsewhere."""
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, rows, values)


def survivors(alive: Tensor, *, exact: bool = False) -> Tensor:
    """The rows to keep when those of alive (b,) bool are still running, int64 (m,).

    All running rows are among them. The last running rows take the indices of finished ones among the first m, so that
    few rows move. Unless ``exact``, above `MANY_ROWS` running rows a few finished ones are kept, so that m is a
    multiple of `ROW_STEP`: the first matrix product of each new size is slow.
    """
    running = alive.nonzero().squeeze(1)
    count = len(running)
    if count > MANY_ROWS and not exact:
        count = min(len(alive), -(-count // ROW_STEP) * ROW_STEP)
    rows = torch.arange(count, device=alive.device)
    moved = running[running >= count]
    rows[(~alive[:count]).nonzero().squeeze(1)[: len(moved)]] = moved
    return rows


class _Outcome:
    """How each episode ended: the fields of `Rollout`, (b,) each."""

    def __init__(self, rows: Tensor) -> None:
        self.returns = torch.zeros(len(rows), device=rows.device)
        self.success = torch.zeros_like(rows, dtype=torch.bool)
        self.steps, self.subgoals_done = torch.zeros_like(rows), torch.zeros_like(rows)
        self.lost: Tensor | None = None

    def close(self, rows: Tensor, env: BatchedEnv) -> None:
        """Records the current state of the episodes ``rows``; a later record of an episode replaces an earlier one."""
        self.success[rows] = env.success
        self.steps[rows], self.subgoals_done[rows] = env.steps, env.subgoals_done
        lost = getattr(env, "lost", None)
        if lost is not None:
            self.lost = torch.zeros_like(self.success) if self.lost is None else self.lost
            self.lost[rows] = lost


class _Decisions:
    """Residuals, codes and log-probabilities at switches, collected step by step; count (b,): of each episode."""

    def __init__(self, rows: Tensor) -> None:
        self.count = torch.zeros_like(rows)
        self.added: list[tuple[Tensor, ...]] = []

    def add(self, rows: Tensor, *values: Tensor) -> None:
        """The next decision of the episodes ``rows`` (m,)."""
        self.added.append((rows, self.count[rows], *values))
        self.count[rows] += 1

    def padded(self) -> list[Tensor]:
        """(b, longest, ...) each, with zeros beyond an episode's last decision; longest is 1 at least."""
        row, index, *values = (torch.cat(parts) for parts in zip(*self.added, strict=True))
        padded, longest = [], max(1, int(self.count.max()))
        for flat in values:
            out = flat.new_zeros(len(self.count), longest, *flat.shape[1:])
            out[row, index] = flat
            padded.append(out)
        return padded
