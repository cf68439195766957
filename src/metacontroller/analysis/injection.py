"""Codes forced in the middle of episodes: does a subgoal's code lead there from wherever one is (Fig. A4)?

Axes: g subgoals, n_z code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from metacontroller.analysis.code_content import CodeMeaning, Walks, code_meaning, two_subgoals
from metacontroller.analysis.loaded_run import LoadedRun
from metacontroller.analysis.registry import Analysis, Results, analysis
from metacontroller.control.metacontroller import MetaController
from metacontroller.models.precision import weights_cast_once
from metacontroller.ranges import Rows, check_fields
from metacontroller.report.analysis_figures import injection_figure


class InjectionResult(NamedTuple):
    """Share of walks whose second subgoal is the one aimed at: free, or with its code forced after the first subgoal;
    over all transitions, and over those that demonstrations never show (nan if there are none, or if the world does not
    tell which they are). by_transition: the forced share from each first subgoal (row) to each other one (column), nan
    where no walk counts."""

    free: float
    forced: float
    free_unseen: float
    forced_unseen: float
    by_transition: list[list[float]]


@torch.no_grad()
@weights_cast_once()
def injected_codes(walks: Walks, meta_controller: MetaController, meaning: CodeMeaning, count: int) -> InjectionResult:
    """Forces 'go to that subgoal' in the middle of an episode (Fig. A4).

    A subgoal's code is the one of ``meaning`` that leads to it most often from an episode's start. The model walks
    freely to a first subgoal; then the code of each other one in turn is in force until the next subgoal, in ``count``
    walks a subgoal, beside as many free ones.
    """
    subgoals, seen = meaning.share.shape[1] - 1, walks.domain.seen_transitions()
    unseen = torch.zeros(subgoals, subgoals, dtype=torch.bool) if seen is None else ~seen.cpu()
    walked, reached = torch.zeros(2, 2, subgoals, subgoals, dtype=torch.long)  # free or forced, from, to
    temperature = meta_controller.action_temperature  # of free walks as well, so that the code is the only difference
    for aim in range(subgoals):
        favourite = meaning.codes[meaning.share[:, aim + 1].argmax()]
        for forced in (0, 1):
            hold = (meta_controller, favourite) if forced else None
            first, second = two_subgoals(walks, count, hold, temperature)
            counted = (first >= 0) & (first != aim)
            walked[forced, :, aim] = torch.bincount(first[counted], minlength=subgoals)
            reached[forced, :, aim] = torch.bincount(first[counted & (second == aim)], minlength=subgoals)

    free, forced = (reached.sum((1, 2)).double() / walked.sum((1, 2))).tolist()
    free_unseen, forced_unseen = (reached[:, unseen].sum(1).double() / walked[:, unseen].sum(1)).tolist()
    return InjectionResult(free, forced, free_unseen, forced_unseen, (reached[1].double() / walked[1]).tolist())


@analysis("injection", command="inject", figure="A4")
class Injection(Analysis):
    """Force each subgoal's code in the middle of episodes, and see where they go (Fig. A4)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How much is walked."""

        walks: Rows = 1024
        """For each subgoal, free and forced."""

        def __post_init__(self) -> None:
            check_fields(self)

    def measure(self, run: LoadedRun, config: Config, *, quiet: bool = False) -> Results:
        walks = Walks(run.model, run.domain, run.walk_steps, torch.Generator(run.device).manual_seed(run.analysis_seed))
        meaning = code_meaning(run, walks.generator)
        injected = injected_codes(walks, run.meta_controller, meaning, config.walks)
        shares = [[None if math.isnan(share) else share for share in row] for row in injected.by_transition]
        return {**injected._asdict(), "by_transition": shares, "walks": config.walks}

    def draw(self, results: Sequence[Results]) -> Any:
        return injection_figure(results)
