"""Codes forced in the middle of episodes: does a subgoal's code lead there from wherever one is (Fig. A4)?

Axes: b episodes, g subgoals, n_z code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from metacontroller.analysis.code_content import CodeMeaning, code_meaning, two_subgoals
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, Results, analysis
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.base import Domain
from metacontroller.models.precision import weights_cast_once
from metacontroller.models.protocol import SteerableModel
from metacontroller.ranges import ROWS, check_fields
from metacontroller.report.analysis_figures import injection_figure
from metacontroller.training.seeding import stream_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class InjectionResult(NamedTuple):
    """Share of walks whose second subgoal is the one named: free, or with its code forced after the first subgoal; over
    all transitions, and over those that demonstrations never show (nan if there are none, or if the world does not tell
    which they are). by_transition: the forced share from each first subgoal (row) to each other one (column), nan where
    no walk counts."""

    free: float
    forced: float
    free_unseen: float
    forced_unseen: float
    by_transition: list[list[float]]


@torch.no_grad()
@weights_cast_once()
def injected_codes(
    model: SteerableModel,
    meta_controller: MetaController,
    domain: Domain,
    meaning: CodeMeaning,
    *,
    walks: int,
    walk_steps: int,
    generator: torch.Generator,
) -> InjectionResult:
    """Forces 'go to that subgoal' in the middle of an episode (Fig. A4).

    A subgoal's code is the one of ``meaning`` that leads to it most often from an episode's start. The model walks
    freely to a first subgoal; then the code of each other one in turn is held until the next subgoal, in ``walks``
    walks a subgoal, beside as many free ones.
    """
    subgoals = meaning.share.shape[1] - 1
    seen = domain.seen_transitions()
    if seen is None:  # not told: none counts as unseen
        seen = torch.ones(subgoals, subgoals, dtype=torch.bool)
    seen = seen.to(generator.device)
    everywhere: dict[bool, list[Tensor]] = {False: [], True: []}
    unseen: dict[bool, list[Tensor]] = {False: [], True: []}
    columns, temperature = [], meta_controller.action_temperature  # free walks as well, so that the code is all
    for subgoal in range(subgoals):
        favourite = meaning.codes[meaning.share[:, subgoal + 1].argmax()]
        for forced in (False, True):
            hold = (meta_controller, favourite) if forced else None
            first, second = two_subgoals(model, domain, walks, walk_steps, generator, hold, temperature)
            counted = (first >= 0) & (first != subgoal)
            everywhere[forced].append((second == subgoal)[counted])
            unseen[forced].append((second == subgoal)[counted & ~seen[first, subgoal]])
        columns.append([_share([(second == subgoal)[counted & (first == row)]]) for row in range(subgoals)])
    return InjectionResult(
        free=_share(everywhere[False]),
        forced=_share(everywhere[True]),
        free_unseen=_share(unseen[False]),
        forced_unseen=_share(unseen[True]),
        by_transition=[list(row) for row in zip(*columns, strict=True)],
    )


def _share(reached: list[Tensor]) -> float:
    whole = torch.cat(reached)
    return float(whole.double().mean()) if len(whole) else math.nan


@analysis("injection", command="inject", figure="A4")
class Injection(Analysis):
    """Force each subgoal's code in the middle of episodes, and see where they go (Fig. A4)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How much is walked."""

        walks: int = 1024
        """For each subgoal, free and forced."""

        def __post_init__(self) -> None:
            check_fields(self, walks=ROWS)

    def measure(self, run: LoadedRun, config: Config, *, quiet: bool = False) -> Results:
        generator = torch.Generator(run.device).manual_seed(stream_seed(run.seed, "analyse"))
        meaning = code_meaning(run, generator)
        injected = injected_codes(
            run.model,
            run.meta_controller,
            run.domain,
            meaning,
            walks=config.walks,
            walk_steps=run.walk_steps,
            generator=generator,
        )
        shares = [[None if math.isnan(share) else share for share in row] for row in injected.by_transition]
        return {**injected._asdict(), "by_transition": shares, "walks": config.walks}

    def draw(self, results: Sequence[Results]) -> Figure:
        return injection_figure(results)
