"""Measuring a trained model: success on a task in held-out episodes (Fig. 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metacontroller.arguments import checked_kinds
from metacontroller.control.metacontroller import MetaController
from metacontroller.domains.base import Domain
from metacontroller.errors import UserError
from metacontroller.models.protocol import SteerableModel
from metacontroller.phases.rollout import policy_proposal, prior_proposal, rollout_abstract, rollout_raw
from metacontroller.ranges import COUNT, MOST_STEPS, ROWS, Whole, check_choice, check_fields, check_number

MAX_BATCH = 1024  # episodes at a time: bounds memory

Policy = Literal["base", "raw", "prior", "internal-rl", "evolved"]
"""What acts: the model's own actions before (base) or after (raw) raw-action RL, or codes of the prior, of the policy
that internal RL trained, or of the one that evolved."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much is measured at the end of a run. UserError for values out of range."""

    episodes: int = 4096
    """Held-out episodes for each success rate."""
    codes: int = 64
    """Codes sampled from the prior, to measure which subgoal a fixed code leads to."""
    layouts_per_code: int = 256
    """Held-out episodes for each of those codes."""
    walk_steps: int | None = None
    """Steps within which a fixed code may reach a subgoal, twice as many for two; none: half of the longest episode."""

    link_updates: int = 1000
    """Updates of the linear probe and of the supervised controllers that a summary reports."""

    def __post_init__(self) -> None:
        check_fields(self, episodes=COUNT, codes=ROWS, layouts_per_code=ROWS, link_updates=COUNT)
        check_fields(self, walk_steps=Whole(most=MOST_STEPS, none=True))


@checked_kinds
def evaluate(
    model: SteerableModel,
    meta_controller: MetaController | None,
    domain: Domain,
    policy: Policy,
    task: Any,
    episodes: int,
    seed: int,
) -> dict[str, Any]:
    """Plays ``episodes`` held-out episodes of a task and returns means over them.

    task: as for `Domain.reset`. seed: of layouts, codes and actions.
    Returns success (share of episodes that the environment reports as solved) and its binomial standard error
    success_se; mean_return and its standard error return_se (None for a single episode); the means subgoals (of the
    task done), steps and decisions (abstract actions; None for raw actions); and policy, task and episodes as given.
    Where an environment can raise, lost is the number of episodes that ended so, unsolved.
    UserError for ``episodes`` below 1 or a missing metacontroller.
    """
    check_number("episodes", episodes, COUNT)
    check_number("seed", seed, Whole(0))
    check_choice("policy", policy, get_args(Policy))
    if policy not in ("base", "raw") and meta_controller is None:
        raise UserError(f"policy {policy!r} acts through a metacontroller; give one, or choose 'base' or 'raw'.")
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    model.eval()
    kept: dict[str, list[Tensor]] = {name: [] for name in ("success", "mean_return", "subgoals", "steps", "decisions")}
    lost: dict[str, int] = {}
    for size in batch_sizes(episodes):
        env = domain.reset(size, generator, task=task)
        if policy in ("base", "raw"):
            rollout = rollout_raw(model, env, generator)
        else:
            assert meta_controller is not None
            proposal = prior_proposal if policy == "prior" else policy_proposal
            rollout = rollout_abstract(model, meta_controller, env, proposal(meta_controller, generator), generator)
            kept["decisions"].append(rollout.lengths)
        kept["success"].append(rollout.success)
        kept["mean_return"].append(rollout.returns)
        kept["subgoals"].append(rollout.subgoals_done)
        kept["steps"].append(rollout.steps)
        if rollout.lost is not None:
            lost["lost"] = lost.get("lost", 0) + int(rollout.lost.sum())
    means = {name: float(torch.cat(values).double().mean()) if values else None for name, values in kept.items()}
    success = means["success"] or 0.0
    spread = float(torch.cat(kept["mean_return"]).double().std()) if episodes > 1 else None
    return {
        "policy": policy,
        "task": domain.format_task(task),
        "episodes": episodes,
        **means,
        "success_se": math.sqrt(success * (1 - success) / episodes),
        "return_se": None if spread is None else spread / math.sqrt(episodes),
        **lost,
    }


def batch_sizes(total: int) -> list[int]:
    """``total`` in chunks of at most `MAX_BATCH`."""
    return [min(MAX_BATCH, total - start) for start in range(0, total, MAX_BATCH)]
