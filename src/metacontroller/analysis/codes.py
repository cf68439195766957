"""What codes mean: which subgoal a held code leads to, in bits (link 3 of the chain); what the unsteered model does.

A subgoal is a single color or a run of several (`subgoal_vocabulary`); it is reached when the last of its colors is
visited. Wherever ``subgoals``, the vocabulary, is not given, each color of the grid is a subgoal.

Axes: b episodes, c codes, o outcomes: no subgoal reached, then each subgoal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metacontroller.control.metacontroller import MetaController
from metacontroller.envs.gridworld_pinpad import PinpadBatch, PinpadConfig
from metacontroller.envs.tasks import Task, single_colors, subgoal_indices, transitions
from metacontroller.models.transformer import Transformer
from metacontroller.phases.internal_rl import task_grids
from metacontroller.phases.rollout import Actor

CODES_AT_ONCE = 1024  # episodes at a time: bounds memory


class CodeMeaning(NamedTuple):
    """bits: mutual information between a code and the subgoal it reaches first. share (c, o): p(outcome | code).
    marginal (o,): p(outcome) over all codes. codes (c, n_z)."""

    bits: float
    share: Tensor
    marginal: Tensor
    codes: Tensor


class InjectionResult(NamedTuple):
    """Share of walks whose second subgoal is the one named: free, or with its code forced after the first subgoal; over
    all transitions, and over those that training never shows (nan if there are none)."""

    free: float
    forced: float
    free_unseen: float
    forced_unseen: float


def mutual_information_bits(counts: Tensor) -> float:
    """I = H(outcome) - E_code H(outcome | code) in bits, from counts (c, o) of equally many tries a code.

    The plug-in estimate is too high by about (C - 1)(O - 1) / (2 N ln 2) (Miller and Madow), which is subtracted; O
    counts only outcomes that occurred. So a result near zero may fall a little below it.
    """
    counts = counts.double()
    share, marginal = counts / counts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
    plug_in = float(_entropy_bits(marginal) - _entropy_bits(share).mean())
    bias = (len(counts) - 1) * (int((marginal > 0).sum()) - 1) / (2 * float(counts.sum()) * math.log(2))
    return plug_in - bias


def _entropy_bits(probability: Tensor) -> Tensor:
    return -torch.xlogy(probability, probability).sum(-1) / math.log(2)


@torch.no_grad()
def code_subgoal_bits(
    model: Transformer,
    meta_controller: MetaController,
    environment: PinpadConfig,
    *,
    codes: int = 64,
    layouts_per_code: int = 256,
    generator: torch.Generator,
    subgoals: Sequence[Task] | None = None,
) -> CodeMeaning:
    """Holds codes drawn from the prior N(0, I) from an episode's start, without switching, on new layouts each.

    The outcome is the subgoal reached first within 4 x size steps for each of its colors, or none.
    """
    subgoals = single_colors(environment.num_colors) if subgoals is None else subgoals
    device = generator.device
    drawn = torch.randn(codes, meta_controller.dim_latent, generator=generator, device=device)
    owner = torch.arange(codes, device=device).repeat_interleave(layouts_per_code)
    reached = torch.cat(
        [
            _first_subgoal(model, meta_controller, drawn[part], environment, subgoals, generator)
            for part in owner.split(CODES_AT_ONCE)
        ]
    )
    outcomes = len(subgoals) + 1
    counts = torch.bincount(owner * outcomes + reached + 1, minlength=codes * outcomes).view(codes, outcomes)
    share = counts / layouts_per_code
    return CodeMeaning(mutual_information_bits(counts), share, share.mean(0), drawn)


def _walks(
    environment: PinpadConfig, subgoals: Sequence[Task], steps: int, n: int, generator: torch.Generator
) -> PinpadBatch:
    """n grids in which to walk without a task, truncated after so many steps for each color of a subgoal."""
    limited = replace(environment, max_steps=steps * len(subgoals[0]))
    return task_grids(limited, (0,), n, generator, subgoals)


def _first_subgoal(
    model: Transformer,
    meta_controller: MetaController,
    code: Tensor,
    environment: PinpadConfig,
    subgoals: Sequence[Task],
    generator: torch.Generator,
) -> Tensor:
    """(b,) int64: the subgoal that each held code (b, n_z) reaches first on a layout of its own, -1 if none."""
    grids = _walks(environment, subgoals, 4 * environment.size, len(code), generator)
    reached = torch.full((len(code),), -1, device=code.device)
    rows = torch.arange(len(code), device=code.device)
    actor = Actor(model, grids, generator)
    while len(rows):
        actor.act(meta_controller.steer(actor.look(), code[rows]))
        grids.terminated = torch.zeros_like(grids.terminated)  # unlike by the rules, a visit does not end the walk
        reached[rows] = grids.reached()
        running = ((reached[rows] < 0) & (grids.steps < grids.config.max_steps)).nonzero().squeeze(1)
        actor.keep(running)
        rows = rows[running]
    return reached


@torch.no_grad()
def unseen_transition_share(
    model: Transformer,
    environment: PinpadConfig,
    tasks: Iterable[Sequence[int]],
    *,
    episodes: int,
    generator: torch.Generator,
    subgoals: Sequence[Task] | None = None,
) -> float:
    """How often the unsteered model, walking freely, goes next to a subgoal that never follows in ``tasks``.

    Over new layouts: of the walks whose first subgoal has such followers and that reach a second one within 8 x size
    steps for each color of a subgoal, the share that reach one of them. A model that has learned nothing of transitions
    takes each other color equally often (1/3 for each of four). nan if no walk counts.
    """
    subgoals = single_colors(environment.num_colors) if subgoals is None else subgoals
    seen = _seen_transitions(subgoals, tasks, generator.device)
    unseen_count, walks = 0, 0
    for start in range(0, episodes, CODES_AT_ONCE):
        walks_now = min(CODES_AT_ONCE, episodes - start)
        first, second = _two_subgoals(model, environment, subgoals, walks_now, generator)
        counted = (second >= 0) & ~seen.all(1)[first]
        walks += int(counted.sum())
        unseen_count += int((~seen[first, second] & counted).sum())
    return unseen_count / walks if walks else math.nan


@torch.no_grad()
def injected_codes(
    model: Transformer,
    meta_controller: MetaController,
    environment: PinpadConfig,
    tasks: Iterable[Sequence[int]],
    *,
    codes: int = 256,
    layouts_per_code: int = 64,
    walks: int = 1024,
    generator: torch.Generator,
    subgoals: Sequence[Task] | None = None,
) -> InjectionResult:
    """Forces 'go to that subgoal' in the middle of an episode (Fig. A4).

    A subgoal's code is the one, of ``codes`` from the prior, that leads to it most often from an episode's start. On
    new layouts the model walks freely to a first subgoal; then the code of each other one in turn is held until the
    next subgoal, in ``walks`` walks a subgoal, beside as many free ones.
    """
    subgoals = single_colors(environment.num_colors) if subgoals is None else subgoals
    meaning = code_subgoal_bits(
        model,
        meta_controller,
        environment,
        codes=codes,
        layouts_per_code=layouts_per_code,
        generator=generator,
        subgoals=subgoals,
    )
    seen = _seen_transitions(subgoals, tasks, generator.device)
    reached: dict[bool, list[Tensor]] = {False: [], True: []}
    unseen: dict[bool, list[Tensor]] = {False: [], True: []}
    for subgoal in range(len(subgoals)):
        favourite = meaning.codes[meaning.share[:, subgoal + 1].argmax()]
        for forced in (False, True):
            hold = (meta_controller, favourite) if forced else None
            first, second = _two_subgoals(model, environment, subgoals, walks, generator, hold)
            counted = (first >= 0) & (first != subgoal)
            reached[forced].append((second == subgoal)[counted])
            unseen[forced].append((second == subgoal)[counted & ~seen[first, subgoal]])
    shares = [_share(found[forced]) for found in (reached, unseen) for forced in (False, True)]
    return InjectionResult(*shares)


def _share(found: list[Tensor]) -> float:
    whole = torch.cat(found)
    return float(whole.double().mean()) if len(whole) else math.nan


def _seen_transitions(subgoals: Sequence[Task], tasks: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    """(subgoal, following subgoal) bool: which of them ``tasks`` hold, and each subgoal after itself."""
    seen = torch.eye(len(subgoals), dtype=torch.bool, device=device)
    for subgoal, following in transitions(subgoal_indices(task, subgoals) for task in tasks):
        seen[subgoal, following] = True
    return seen


def _two_subgoals(
    model: Transformer,
    environment: PinpadConfig,
    subgoals: Sequence[Task],
    episodes: int,
    generator: torch.Generator,
    hold: tuple[MetaController, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The first subgoal that each free walk reaches and the next different one, (b,) int64, -1 where there was none.

    hold: a metacontroller and a code (n_z,) by which it steers once the first subgoal is reached.
    """
    grids = _walks(environment, subgoals, 8 * environment.size, episodes, generator)
    first, second = torch.full_like(grids.agent, -1), torch.full_like(grids.agent, -1)
    actor = Actor(model, grids, generator)
    while not bool(((second >= 0) | grids.truncated).all()):
        residual = actor.look()
        if hold is not None:
            meta_controller, code = hold
            steered = meta_controller.steer(residual, code.expand(len(residual), -1))
            residual = torch.where((first >= 0)[:, None], steered, residual)
        actor.act(residual)
        grids.terminated = torch.zeros_like(grids.terminated)  # unlike by the rules, a visit does not end the walk
        reached = grids.reached()
        second = torch.where((second < 0) & (first >= 0) & (reached >= 0) & (reached != first), reached, second)
        first = torch.where(first < 0, reached, first)
    return first, second
