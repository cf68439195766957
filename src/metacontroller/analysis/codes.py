"""What codes mean: which color a held code leads to, in bits (link 3 of the chain), and what the unsteered model does.

Axes: b episodes, c codes, o outcomes: no color reached, then each color.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metacontroller.control.metacontroller import MetaController
from metacontroller.envs.gridworld_pinpad import PinpadConfig
from metacontroller.envs.tasks import transitions
from metacontroller.models.transformer import Transformer
from metacontroller.phases.internal_rl import task_grids
from metacontroller.phases.rollout import Actor

CODES_AT_ONCE = 1024  # episodes at a time: bounds memory


class CodeMeaning(NamedTuple):
    """bits: mutual information between a code and the color it reaches first. share (c, o): p(outcome | code).
    marginal (o,): p(outcome) over all codes."""

    bits: float
    share: Tensor
    marginal: Tensor


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
) -> CodeMeaning:
    """Holds codes drawn from the prior N(0, I) from an episode's start, without switching, on new layouts each.

    The outcome is the color reached first within 4 x size steps, or none.
    """
    device = generator.device
    drawn = torch.randn(codes, meta_controller.dim_latent, generator=generator, device=device)
    owner = torch.arange(codes, device=device).repeat_interleave(layouts_per_code)
    reached = torch.cat(
        [
            _first_color(model, meta_controller, drawn[part], environment, generator)
            for part in owner.split(CODES_AT_ONCE)
        ]
    )
    outcomes = environment.num_colors + 1
    counts = torch.bincount(owner * outcomes + reached + 1, minlength=codes * outcomes).view(codes, outcomes)
    share = counts / layouts_per_code
    return CodeMeaning(mutual_information_bits(counts), share, share.mean(0))


def _first_color(
    model: Transformer,
    meta_controller: MetaController,
    code: Tensor,
    environment: PinpadConfig,
    generator: torch.Generator,
) -> Tensor:
    """(b,) int64: the color that each held code (b, n_z) reaches first on a layout of its own, -1 if none."""
    limited = replace(environment, max_steps=4 * environment.size)
    grids = task_grids(limited, (0,), len(code), generator)  # any color ends an episode of one color
    reached = torch.full((len(code),), -1, device=code.device)
    rows = torch.arange(len(code), device=code.device)
    actor = Actor(model, grids, generator)
    while len(rows):
        actor.act(meta_controller.steer(actor.look(), code[rows]))
        reached[rows] = grids.visited_color()
        running = (~(grids.terminated | grids.truncated)).nonzero().squeeze(1)
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
) -> float:
    """How often the unsteered model, walking freely, goes next to a color that never follows in ``tasks``.

    Over new layouts: of the walks whose first color has such followers and that reach a second color within 8 x size
    steps, the share that reach one of them. A model that has learned nothing of transitions takes each other color
    equally often (1/3 for each of four). nan if no walk counts.
    """
    seen = torch.eye(environment.num_colors, dtype=torch.bool, device=generator.device)
    for color, following in transitions(tasks):
        seen[color, following] = True
    unseen_count, walks = 0, 0
    for start in range(0, episodes, CODES_AT_ONCE):
        first, second = _two_colors(model, environment, min(CODES_AT_ONCE, episodes - start), generator)
        counted = (second >= 0) & ~seen.all(1)[first]
        walks += int(counted.sum())
        unseen_count += int((~seen[first, second] & counted).sum())
    return unseen_count / walks if walks else math.nan


def _two_colors(
    model: Transformer, environment: PinpadConfig, episodes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The first color that each free walk reaches and the next different one, (b,) int64, -1 where there was none."""
    limited = replace(environment, max_steps=8 * environment.size)
    grids = task_grids(limited, (0,), episodes, generator)
    first, second = torch.full_like(grids.agent, -1), torch.full_like(grids.agent, -1)
    actor = Actor(model, grids, generator)
    while not bool(((second >= 0) | grids.truncated).all()):
        actor.act(actor.look())
        grids.terminated = torch.zeros_like(grids.terminated)  # unlike by the rules, a visit does not end the walk
        visited = grids.visited_color()
        second = torch.where((second < 0) & (first >= 0) & (visited >= 0) & (visited != first), visited, second)
        first = torch.where(first < 0, visited, first)
    return first, second
