"""What codes mean: which subgoal a code that is kept in force leads to, in bits; what the unsteered model does.

Walks are episodes without a task: they end by time alone, whatever is reached.

Axes: b episodes, c codes, n_z code, g subgoals, o outcomes: no subgoal reached, then each subgoal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.base import FREE, Domain
from metacontroller.errors import UserError
from metacontroller.metrics.information import mutual_information_bits
from metacontroller.models.precision import weights_cast_once
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.evaluate import MAX_BATCH, batch_sizes
from metacontroller.phases.rollout import Actor


@dataclass(frozen=True)
class Walks:
    """Who walks where. steps: within which a walk may reach a subgoal. generator: of layouts, codes and actions."""

    model: SteerableModel
    domain: Domain
    steps: int
    generator: torch.Generator


class CodeMeaning(NamedTuple):
    """bits: mutual information between a code and the subgoal it reaches first. share (c, o): p(outcome | code).
    marginal (o,): p(outcome) over all codes. codes (c, n_z)."""

    bits: float
    share: Tensor
    marginal: Tensor
    codes: Tensor


def code_meaning(run: LoadedRun, generator: torch.Generator) -> CodeMeaning:
    """`code_subgoal_bits` of a run, as much as its settings say."""
    walks = Walks(run.model, run.domain, run.walk_steps, generator)
    return code_subgoal_bits(walks, run.meta_controller, run.settings.codes, run.settings.layouts_per_code)


@torch.no_grad()
@weights_cast_once()
def code_subgoal_bits(walks: Walks, meta_controller: MetaController, codes: int, layouts_per_code: int) -> CodeMeaning:
    """Keeps codes drawn from the prior in force from an episode's start, each in episodes of different layouts.

    The outcome is the subgoal reached first within ``walks.steps``, or none. UserError for a world without subgoals.
    """
    outcomes, device = len(walks.domain.spec().subgoals) + 1, walks.generator.device
    if outcomes == 1:
        raise UserError(f"the world {walks.domain.name} names no subgoals to be reached; give one whose spec does.")
    noise = torch.randn(codes, meta_controller.codes.noise_dim, generator=walks.generator, device=device)
    prior = meta_controller.codes.sample(meta_controller.codes.prior(noise, codes), noise=noise)
    code = torch.arange(codes, device=device).repeat_interleave(layouts_per_code)
    reached = torch.cat([_first_subgoal(walks, meta_controller, prior[rows]) for rows in code.split(MAX_BATCH)])
    counts = torch.bincount(code * outcomes + reached + 1, minlength=codes * outcomes).view(codes, outcomes)
    share = counts / layouts_per_code
    return CodeMeaning(mutual_information_bits(counts), share, share.mean(0), prior)


def _first_subgoal(walks: Walks, meta_controller: MetaController, code: Tensor) -> Tensor:
    """(b,) int64: the subgoal that each code (b, n_z) reaches first in an episode, -1 if none."""
    env = walks.domain.reset(len(code), walks.generator, task=FREE, max_steps=walks.steps)
    reached = torch.full((len(code),), -1, device=code.device)
    rows = torch.arange(len(code), device=code.device)
    actor = Actor(walks.model, env, walks.generator, temperature=meta_controller.action_temperature)
    while len(rows):
        actor.act(meta_controller.steer(actor.look(), code[rows]))
        reached[rows] = env.reached()
        running = ((reached[rows] < 0) & ~(env.terminated | env.truncated)).nonzero().squeeze(1)
        actor.keep(running)
        rows = rows[running]
    return reached


@torch.no_grad()
@weights_cast_once()
def unseen_transition_share(walks: Walks, episodes: int) -> float:
    """How often the unsteered model goes next to a subgoal that never follows in demonstrations.

    Of the walks whose first subgoal has such followers and that reach a second one within twice ``walks.steps``, the
    share that reach one of them. A model that has learned nothing of transitions takes each other subgoal equally often
    (1/3 for each of four). nan if no walk counts, and where the world does not tell which transitions are seen.
    """
    seen = walks.domain.seen_transitions()
    if seen is None:
        return math.nan
    seen = seen.to(walks.generator.device)
    unseen_count, total = 0, 0
    for size in batch_sizes(episodes):
        first, second = two_subgoals(walks, size)
        counted = (second >= 0) & ~seen.all(1)[first]
        total += int(counted.sum())
        unseen_count += int((~seen[first, second] & counted).sum())
    return unseen_count / total if total else math.nan


def two_subgoals(
    walks: Walks, episodes: int, hold: tuple[MetaController, Tensor] | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The first subgoal that each walk of at most twice ``walks.steps`` reaches and the next different one, (b,) int64,
    -1 where there was none.

    hold: a metacontroller and a code (n_z,) by which it steers once the first subgoal is reached. temperature: of the
    model's actions.
    """
    env = walks.domain.reset(episodes, walks.generator, task=FREE, max_steps=2 * walks.steps)
    first, second = torch.full_like(env.steps, -1), torch.full_like(env.steps, -1)
    actor = Actor(walks.model, env, walks.generator, temperature=temperature)
    while not bool(((second >= 0) | env.terminated | env.truncated).all()):
        residual = actor.look()
        if hold is not None:
            meta_controller, code = hold
            steered = meta_controller.steer(residual, code.expand(len(residual), -1))
            residual = torch.where((first >= 0)[:, None], steered, residual)
        actor.act(residual)
        reached = env.reached()
        second = torch.where((second < 0) & (first >= 0) & (reached >= 0) & (reached != first), reached, second)
        first = torch.where(first < 0, reached, first)
    return first, second
